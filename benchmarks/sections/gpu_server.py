"""The section of ``bench_gpu_server.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import charts
from sections.page import facts, markdown_table, quartiles

__all__ = ["section"]

GPU_SERVER = """
## What does the server add on a GPU?

[bench_gpu_server.py](bench_gpu_server.py): resnet50 `avgpool` with {extractor}, float32
({float32}). The server replays CUDA graphs at the batch sizes {graphs}. The loop is the same plan
without a server, {loop}: for each batch the input is copied from page-locked memory and the layer
back to it. Latency of a single caller in milliseconds, and its phases in the server; loop and
server alternate:

{latency}

Answers per second, medians of {rounds} rounds of {seconds} s with their quartiles, and their share
of the loop's batches per second. Callers are spread over several client processes on the server's
machine. Photographs are compared with the loop for tensors of batch 1, which decodes nothing:

{rates}
{graph_loop}
Large replies: resnet18 `layer1` in float32, in milliseconds. Each request also sends its input,
which is three quarters of the reply's size:

{large}

Machine: {facts}.
"""

GRAPH_LOOP = """
Another run of one round, in which the loop uses a CUDA graph like the server's plan:

{table}
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    servers = results["servers"]
    first = next(of for of in servers.values() if "latency" in of)
    rows = []
    for name, row in first["latency"].items():
        parts = [
            charts.digits(row[part]) if part in row else "–"
            for part in ("prepare_ns", "queue_ns", "compute_ns", "total_ns")
        ]
        rows.append([name, quartiles(row), *parts])
    callers = [who for who in next(iter(first["rates"].values())) if who != "loop"]
    rates = [
        [f"{server}, {case}", quartiles(row["loop"])]
        + [f"{quartiles(row[who])}, {row[who]['p50'] / row['loop']['p50']:.0%}" for who in callers]
        for server, of in servers.items()
        for case, row in of["rates"].items()
    ]
    sizes = first["large"]
    large = [
        [way, *(quartiles(size["rows"][way]) for size in sizes.values())]
        for way in next(iter(sizes.values()))["rows"]
    ]
    charts.lines(
        folder / "gpu_server.png",
        {
            f"{server}, {case}": [(int(who), row[who]["p50"]) for who in callers]
            for server, of in servers.items()
            for case, row in of["rates"].items()
        },
        "callers", "answers per second",
    )  # fmt: skip
    return GPU_SERVER.format(
        extractor=results["extractor"],
        float32=results["machine"]["float32"],
        graphs=results["graphs"],
        loop=results["loop"],
        graph_loop=_graph_loop(results.get("graph_loop", {})),
        latency=markdown_table(
            ["", "p50 (quartiles)", "prepare", "queue", "compute", "total"], rows
        ),
        rounds=results["rounds"],
        seconds=results["seconds"],
        rates=markdown_table(["", "loop", *(f"{who} callers" for who in callers)], rates)
        + "\n\n![Answers a second by the number of callers](results/gpu_server.png)",
        large=markdown_table(["", *sizes], large),
        facts=facts(results["machine"]),
    )


def _graph_loop(rows: dict[str, dict[str, float]]) -> str:
    if not rows:
        return ""
    callers = [who for who in next(iter(rows.values())) if who != "loop"]
    shares = [
        [
            case,
            f"{row['loop']:.0f}",
            *(f"{row[w]:.0f} ({row[w] / row['loop']:.0%})" for w in callers),
        ]
        for case, row in rows.items()
    ]
    return GRAPH_LOOP.format(
        table=markdown_table(["", "loop", *(f"{w} callers" for w in callers)], shares)
    )
