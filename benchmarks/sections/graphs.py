"""The section about CUDA graphs, of ``bench_matrix.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import charts
from sections.page import facts, markdown_table

__all__ = ["section"]

GRAPHED = ["FX", "HOOK", "TORCHSCRIPT", "HOOK, CUDA graph", "TORCHSCRIPT, CUDA graph"]

GRAPHS = """
## What does a CUDA graph save?

[bench_matrix.py](bench_matrix.py): {note}. A dash means that the pass can't be recorded or that the
extractor does not serve the layers. Machine: {facts}.

{table}
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    rows = []
    for title, sets in results["tables"].items():
        for layers, ways in sets.items():
            times = [charts.digits(ways[way]["p50"]) if way in ways else "–" for way in GRAPHED]
            rows.append([f"{title}, {layers}", *times])
    return GRAPHS.format(
        facts=facts(results["machine"]),
        note=results["note"],
        table=markdown_table(["", *GRAPHED], rows),
    )
