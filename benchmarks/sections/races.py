"""The section of ``bench_races.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sections.page import facts, markdown_table, quartiles

__all__ = ["section"]

RACES = """
## Is AUTO as fast as the best single extractor?

[bench_races.py](bench_races.py): AUTO races the proven extractors for a layer and a batch size
([which one AUTO takes](../docs/extraction.md#which-extractor-auto-takes)), and then takes turns
with each of them, in this process. Milliseconds, median (quartiles) of {rounds} turns; the last
column is the median (quartiles) of the ratios of the turns to the extractor with the best median.
The values were compared first. {threads} threads. Where AUTO took TORCHSCRIPT
[with channels last](../docs/extraction.md#channels-last), which has no column, it can be
faster than all of them. Where it took TORCHSCRIPT, and that is the best, both columns ran the same
program, so what the ratio differs from 1 is the machine's noise. Machine: {facts}.

{table}
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    rows = results["rows"]
    ways = list(next(iter(rows.values()))["milliseconds"])
    table = [
        [
            name,
            *(quartiles(row["milliseconds"][way]) for way in ways),
            row["race"].split(" was ")[0],
            row["best"].upper(),
            "{p50:.3f} ({p25:.3f}–{p75:.3f})".format(**row["AUTO / best, by round"]),
        ]
        for name, row in rows.items()
    ]
    return RACES.format(
        rounds=results["rounds"],
        threads=results["threads"],
        facts=facts(results["machine"]),
        table=markdown_table(
            [
                "model, layer, items",
                *(way.upper() for way in ways),
                "AUTO took",
                "best",
                "AUTO / best",
            ],
            table,
        ),
    )
