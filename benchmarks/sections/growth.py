"""The section of ``bench_growth.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import charts
from sections.page import facts, markdown_table

__all__ = ["section"]

GROWTH = """
## How does everything grow?

[bench_growth.py](bench_growth.py): one curve for each row. The slope is that of a line through the
logarithms: 0 if a cost stays the same, 1 if it doubles with what it depends on; less is better. A
curve bends if this slope, or that of its last three points, is more than 0.25 above the expected
one. Requests are for `layer1` of resnet18 at 3 × 64 × 64 unless the row says otherwise;
{seconds:g} s for each point. Machine: {facts}.

{table}

![The curves, both axes logarithmic](results/growth.png)
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    curves = results["curves"]
    charts.curves(folder / "growth.png", curves)
    rows = [
        [
            name,
            f"{curve['y']} / {curve['x']}",
            ", ".join(
                f"{charts.digits(y)} / {x if isinstance(x, int) else charts.digits(x)}"
                for x, y in curve["points"]
            ),
            f"{curve['slope']:.2f}",
            f"{curve['end']:.2f}",
            f"{curve['expected']:.2f}",
            "bends" if curve["bends"] else "as expected",
        ]
        for name, curve in curves.items()
    ]
    return GROWTH.format(
        seconds=results["seconds"],
        facts=facts(results["machine"]),
        table=markdown_table(
            ["curve", "what", "points", "slope", "at the end", "at most", "verdict"], rows
        ),
    )
