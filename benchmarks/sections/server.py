"""The section of ``bench_server.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import charts
from sections.page import facts, markdown_table

__all__ = ["section"]

SERVER = """
## How much time does the server add, and how does it scale with many callers?

[bench_server.py](bench_server.py): resnet18 at 3 × 224 × 224, batch 1, with TORCHSCRIPT. The table
has the latency of a single caller in milliseconds. The plan and the server run in separate
processes and alternate; all of them keep freed memory. The bare server is the lower bound: grpcio
around the same plan, which takes the input's bytes and returns the layer's, and parses, checks and
counts nothing:

{latency}

A `layer1` reply has 0.8 MB and an `avgpool` reply 2 KB. The input tensor has 0.6 MB; the photograph
has 60 KB, and the server decodes and preprocesses it. The slowest of the first {first} requests
after READY took {slowest:.1f} times the later median.

Requests per second for `layer1`, and their share of a loop without a server, in both modes of
[`--mode`](../docs/performance.md). The clients are threads of one Python process on the same cores:

{throughput}

![Requests per second by the number of clients](results/server.png)

Eight of these clients, with and without [shared forward passes](../docs/batching.md):

{batching}

Machine: {facts}.
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    latency, modes = results["latency"], results["throughput"]
    rows = []
    for name, row in latency.items():
        layer = name.partition(",")[0]
        plan = latency[f"{layer}, plan in process"]
        bare = latency[f"{layer}, bare gRPC server"]
        ratio, added = row["p50"] / plan["p50"], row["p50"] - plan["p50"]
        rows.append(
            [
                name,
                charts.digits(row["p50"]),
                charts.digits(row["p99"]),
                f"{ratio:.2f}×",
                charts.digits(added),
                f"{row['p50'] / bare['p50']:.2f}×" if row is not plan else "–",
            ]
        )
    clients = [name for name in next(iter(modes.values())) if name.endswith("clients")]
    bare_clients = [name for name in next(iter(modes.values())) if name.endswith("bare server")]
    rates = []
    for mode, of in modes.items():
        loop = of["loop in process"]
        shares = [f"{of[name]:.0f} ({of[name] / loop:.0%})" for name in clients + bare_clients]
        rates.append([mode, f"{loop:.0f}", *shares])
    charts.lines(
        folder / "server.png",
        {m: [(int(n.split()[0]), of[n]) for n in clients] for m, of in modes.items()},
        "clients", "requests per second",
    )  # fmt: skip
    return SERVER.format(
        latency=markdown_table(
            ["", "p50", "p99", "relative to the plan", "added", "relative to the bare server"], rows
        ),
        first=len(results["first_requests"]["first"]),
        slowest=results["first_requests"]["slowest_of_first_to_median"],
        throughput=markdown_table(["mode", "loop", *clients, *bare_clients], rates),
        batching=markdown_table(
            ["mode and batching", "requests per second", "p50, ms", "p99, ms"],
            (
                [name, *(charts.digits(row[key]) for key in ("rate", "p50", "p99"))]
                for name, row in results["batching"].items()
            ),
        ),
        facts=facts(results["machine"]),
    )
