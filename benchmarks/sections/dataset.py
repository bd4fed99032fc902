"""The section of ``bench_dataset.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sections.page import facts, markdown_table

__all__ = ["section"]

DATASET = """
## How many photos a second does `layertap extract` turn into features?

[bench_dataset.py](bench_dataset.py) (`make bench-dataset`): {items} generated JPEGs, resnet50
`avgpool` with random weights by {extractor}, relative to the bare plan on batches that are in
memory already; medians of {turns} turns, each in a process of its own. The times of layertap
include the choice of the extractor, its compilation and the writing. Machine: {facts}.

{table}

Memory: an output of {output:.1f} GB with `--memory` {budget:.0f} MiB. The process had at most
{before:.0f} MiB in RAM while the engine alone compiled, proved and ran the same batches. During the
run it had at most {peak:.0f} MiB; the engine and the budget together are {allowed:.0f} MiB.
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    rates, memory = results["rates"], results["memory"]
    rows = [
        [way, f"{row['items a second']:.1f}", f"{row['of the bare plan']:.2f}×",
         f"{row['largest difference']:.0e}"]
        for way, row in rates["ways"].items()
    ]  # fmt: skip
    return DATASET.format(
        items=rates["items"],
        turns=rates["turns"],
        extractor=rates["extractor"].upper(),
        facts=facts(results["machine"]),
        table=markdown_table(["", "photos a second", "relative", "largest difference"], rows),
        output=memory["output bytes"] / 1e9,
        budget=memory["budget bytes"] / (1 << 20),
        before=memory["engine peak bytes"] / (1 << 20),
        peak=memory["peak bytes"] / (1 << 20),
        allowed=(memory["engine peak bytes"] + memory["budget bytes"]) / (1 << 20),
    )
