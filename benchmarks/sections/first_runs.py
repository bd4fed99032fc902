"""The section of ``bench_first_runs.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sections.page import facts, markdown_table, quartiles

__all__ = ["section"]

FIRST_RUNS = """
## What do a program's first runs cost?

[bench_first_runs.py](bench_first_runs.py): a TorchScript program's first three runs and its later
ones on this CPU, in milliseconds at batch 1, with torch's profiling executor and without it, as
layertap runs it. First runs are medians of {copies} fresh copies, later ones medians (quartiles) of
{rounds} runs; both ways took turns, and their outputs are equal bit by bit. Machine: {facts}.

{table}
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    table = [
        [
            name,
            *(
                cell
                for row in ways.values()
                for cell in (
                    ", ".join(f"{each:.0f}" for each in row["first_ms"]),
                    quartiles(row["later_ms"]),
                )
            ),
        ]
        for name, ways in results["models"].items()
    ]
    ways = list(next(iter(results["models"].values())))
    head = ["", *(cell for way in ways for cell in (f"{way}: first three", f"{way}: later"))]
    return FIRST_RUNS.format(
        copies=results["copies"],
        rounds=results["rounds"],
        facts=facts(results["machine"]),
        table=markdown_table(head, table),
    )
