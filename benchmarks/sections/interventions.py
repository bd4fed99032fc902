"""The section of ``bench_interventions.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sections.page import facts, markdown_table, quartiles

__all__ = ["section"]

INTERVENTIONS = """
## What do interventions cost?

[bench_interventions.py](bench_interventions.py): resnet50, one image of 224 × 224, in this process.
In each of 64 passes another channel of a block is set to zero, in one request with 64 sets; by hand
it is a loop of whole passes with a hook. Beside one forward pass, 64 ablations took {ratios} (the
median of each). The results were compared first. {threads} threads. Machine: {facts}.

{table}
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    ways, ratios = results["ways"], results["ratios"]
    return INTERVENTIONS.format(
        ratios=", ".join(f"**{ratio:.2f} ×** at {layer}" for layer, ratio in ratios.items()),
        threads=results["threads"],
        table=markdown_table(
            ["", "ms (quartiles)"], [[way, quartiles(row)] for way, row in ways.items()]
        ),
        facts=facts(results["machine"]),
    )
