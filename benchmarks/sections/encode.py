"""The section of ``bench_encode.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import charts
from sections.page import facts, markdown_table

__all__ = ["section"]

ENCODE = """
## How long does encoding a message take?

[bench_encode.py](bench_encode.py): encodes a 12.8 MB activation into a finished message;
milliseconds. In brackets: the speed relative to torch's steps (cast, contiguous, `tobytes`,
protobuf). The last columns are the throughput of two threads relative to one, and the same for
plain copies. If plain copies don't double either, memory bandwidth is the limit. Machine: {facts}.

{table}
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    rows = []
    for name, ways in results["cases"].items():
        theirs, own = ways["torch's steps"]["p50"], ways["ours"]["p50"]
        copy = ways["memcpy of float32"]["p50"]
        faster = f"{charts.digits(own)} ({theirs / own:.1f}×)"
        shown = [charts.digits(copy), charts.digits(theirs), faster]
        both = [f"{ways[way]:.2f}×" for way in ("two threads", "two threads, memcpy")]
        rows.append([name, *shown, *both])
    head = ["", "memcpy of float32", "torch's steps", "layertap", "two threads", "of memcpy"]
    return ENCODE.format(table=markdown_table(head, rows), facts=facts(results["machine"]))
