"""The section of ``bench_gradients.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sections.page import facts, markdown_table, quartiles

__all__ = ["section"]

GRADIENTS = """
## What do gradients cost?

[bench_gradients.py](bench_gradients.py): resnet50, one image of 224 × 224, in this process by HOOK,
all ways in turns. Grad-CAM of the last block took **{cam:.2f} ×** the plain forward pass (the
median of each). Integrated gradients of an input of 112 × 112 with 50 steps took
**{sweep:.2f} ×** a loop written by hand in PyTorch, which also has {rows} items in a batch and
computes the score at both ends. The results were compared first. {threads} threads. Machine:
{facts}.

{table}
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    ways = results["ways"]
    middle = {way: row["p50"] for way, row in ways.items()}
    return GRADIENTS.format(
        cam=middle["Grad-CAM"] / middle["forward pass"],
        sweep=middle["integrated gradients"] / middle["integrated gradients by hand"],
        rows=results["rows"],
        threads=results["threads"],
        table=markdown_table(
            ["", "ms (quartiles)"], [[way, quartiles(row)] for way, row in ways.items()]
        ),
        facts=facts(results["machine"]),
    )
