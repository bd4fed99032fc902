"""The section of ``bench_ray_data.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sections.page import facts, markdown_table

__all__ = ["section"]

RAY_DATA = """
## How many items a second do two actors run, beside one?

[bench_ray_data.py](bench_ray_data.py): `layertap.ray.extract` with a resnet18 and random weights,
one core for each actor, {items} items; medians of {rounds} turns. Machine: {facts}.

{table}
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    rates = results["rates"]
    rows = [[actors, f"{rate:.1f}", f"{rate / rates['1']:.2f}×"] for actors, rate in rates.items()]
    return RAY_DATA.format(
        items=results["items"],
        rounds=results["rounds"],
        facts=facts(results["machine"]),
        table=markdown_table(["actors", "items a second", "relative"], rows),
    )
