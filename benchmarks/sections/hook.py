"""The section of ``bench_hook.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import charts
from sections.page import facts, markdown_table

__all__ = ["section"]

HOOK = """
## How much does a hook that writes into the reply save, compared with one that clones?

[bench_hook.py](bench_hook.py): all {layers} layers of resnet50 with HOOK, in a message of
{message:.0f} MiB. Machine: {facts}.

{table}
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    ways = results["ways"]
    first = next(iter(ways.values()))
    rows = [
        [
            way,
            charts.digits(row["p50"]),
            f"{first['p50'] / row['p50']:.2f}×",
            f"{row['peak_mib']:.0f}",
        ]
        for way, row in ways.items()
    ]
    return HOOK.format(
        layers=first["layers"],
        message=first["message_mib"],
        table=markdown_table(
            ["method", "p50, ms", "", "MiB that the first call added to the peak"], rows
        ),
        facts=facts(results["machine"]),
    )
