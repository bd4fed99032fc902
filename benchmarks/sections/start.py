"""The section of ``bench_start.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sections.page import facts, markdown_table, quartiles

__all__ = ["section"]

START = """
## How long does a restart take?

[bench_start.py](bench_start.py): seconds from the start of a process, median (quartiles) of
{rounds} in turns. Plain PyTorch imports torch and torchvision, builds resnet50, loads its weights
from a file and runs it once under hooks on {layers}. The server has the same weights, declares
these layers and finds the plan cache of an earlier start; it is ready once their values were
compared and their programs are warm. It takes **{ratio} times** as long as plain PyTorch. Its
answers were compared with the hooks' values. Machine: {facts}.

{table}
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    return START.format(
        rounds=results["rounds"],
        layers=", ".join(f"`{layer}`" for layer in results["layers"]),
        ratio=quartiles(results["times_as_long_as_plain"]),
        facts=facts(results["machine"]),
        table=markdown_table(
            ["", "s"], [[way, quartiles(row)] for way, row in results["seconds"].items()]
        ),
    )
