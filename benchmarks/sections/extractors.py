"""The section of ``bench_extractors.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import charts
from sections.page import facts, markdown_table

__all__ = ["section"]

EAGER = "full eager pass with cloning hooks"

EXTRACTORS = """
## How long does each extractor take?

[bench_extractors.py](bench_extractors.py): milliseconds at batch 1, medians of {rounds} runs. In
brackets: the speed-up over the usual way, a full eager pass with cloning hooks. Machine: {facts}.

{table}

![Milliseconds of each extractor, by case](results/extractors.png)
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    cases = results["cases"]
    names = list(dict.fromkeys(name for case in cases.values() for name in case))
    rows = [[name, *(_with_ratio(case, name) for case in cases.values())] for name in names]
    charts.bars(
        folder / "extractors.png",
        {case: {n: r["p50"] for n, r in ways.items()} for case, ways in cases.items()},
    )
    return EXTRACTORS.format(
        rounds=results["rounds"],
        facts=facts(results["machine"]),
        table=markdown_table(["method", *cases], rows),
    )


def _with_ratio(case: dict[str, Any], name: str) -> str:
    if name not in case:
        return "–"
    p50 = case[name]["p50"]
    return f"{p50:.1f} ({case[EAGER]['p50'] / p50:.2f}×)"
