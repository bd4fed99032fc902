"""The section of ``bench_ray_serve.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sections.page import facts, markdown_table

__all__ = ["section"]

RAY_SERVE = """
## What does Ray's gRPC proxy cost?

[bench_ray_serve.py](bench_ray_serve.py): one replica with a resnet18 and random weights, called at
its own gRPC port and through Ray's proxy, in turns; milliseconds, median / 99th percentile of a
lone caller by size of the reply. Client, proxy and replica share the cores. Machine: {facts}.

{times}

{callers} callers, and one stream, with replies of 2 KB:

{rates}
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    ways = list(next(iter(results["latency"].values())))
    times = [
        [case, *(f"{by_way[way]['p50']:.2f} / {by_way[way]['p99']:.2f}" for way in ways)]
        for case, by_way in results["latency"].items()
    ]
    rates = [
        [what, *(f"{by_way[way]:.1f}" for way in ways)] for what, by_way in results["rates"].items()
    ]
    return RAY_SERVE.format(
        facts=facts(results["machine"]),
        callers=results["callers"],
        times=markdown_table(["reply", *ways], times),
        rates=markdown_table(["a second", *ways], rates),
    )
