"""The section of ``bench_memory.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import charts
from sections.page import facts

__all__ = ["section"]

MEMORY = """
## Does a server's memory level off?

[bench_memory.py](bench_memory.py): {requests:,} requests of every kind from 4 clients, including
invalid ones. Resident memory was {start:.0f} MiB when the server was ready, at most {first:.0f} MiB
during the first half of the requests and at most {second:.0f} MiB during the second. The server
keeps freed memory up to [a limit](../docs/performance.md#memory-that-the-process-keeps), and then
returns all of it to the system. Machine: {facts}.

![Resident memory over the requests](results/memory.png)
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    curve = results["resident_mib"]
    half = len(curve) // 2
    charts.lines(folder / "memory.png", {"server": curve}, "requests", "resident memory, MiB")
    return MEMORY.format(
        requests=results["requests"],
        start=curve[0][1],
        first=max(mib for _, mib in curve[:half]),
        second=max(mib for _, mib in curve[half:]),
        facts=facts(results["machine"]),
    )
