"""The section of ``bench_wire.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import charts
from sections.page import facts, markdown_table

__all__ = ["section"]

WIRE = """
## How long does sending a reply take, and what is the lower bound?

[bench_wire.py](bench_wire.py): sends an array from one process to another, without a model. The
time ends when the receiver has read one element of each page and released the array; milliseconds,
median / 90th percentile of {calls} calls. "Memory kept" means
[`layertap.keep_memory()`](../docs/performance.md) on both sides; shared memory is what
[clients on the server's machine use](../docs/shared_memory.md). Machine: {facts}.

{times}

At 800 KB a process that has imported torch keeps the memory of a message without being asked:
while torch is imported, glibc raises the size from which blocks get pages of their own. A call of
the naive row then takes fewer than 10 page faults in each process; a client without torch takes
about 400, and a process in which glibc keeps to its first limit of 128 KB about 700 as a client and
1,000 as a server. So ratios to the naive row at this size are smaller than for clients without
torch.

Speed relative to naive protobuf, and as a share of the speed of a raw TCP socket that receives into
a reused buffer. The goals are at least 50 % of the raw socket, and 5 times naive protobuf for
12.8 MB and 6 times for 102 MB; with shared memory, 20 and 25 times:

{ratios}

![Milliseconds of each row, by size](results/wire.png)
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    sizes = results["sizes"]
    names = list(next(iter(sizes.values()))["rows"])
    by_row = {name: [size["rows"][name] for size in sizes.values()] for name in names}
    charts.bars(
        folder / "wire.png",
        {size: {n: r["p50"] for n, r in of["rows"].items()} for size, of in sizes.items()},
    )
    calls = [str(size["calls"]) for size in sizes.values()]
    return WIRE.format(
        calls=f"{', '.join(calls[:-1])} and {calls[-1]}",
        facts=facts(results["machine"]),
        times=markdown_table(
            ["row", *sizes],
            (
                [n, *(f"{charts.digits(r['p50'])} / {charts.digits(r['p90'])}" for r in rs)]
                for n, rs in by_row.items()
            ),
        ),
        ratios=markdown_table(
            ["row", *sizes],
            (
                [n, *(f"{_naive(r):.1f}×, {_raw(r):.0%}" for r in rs)]
                for n, rs in by_row.items()
                if n.startswith("layertap")
            ),
        ),
    )


def _naive(row: dict[str, float]) -> float:
    return row["times_as_fast_as_naive"]


def _raw(row: dict[str, float]) -> float:
    return row["share_of_raw_tcp"]
