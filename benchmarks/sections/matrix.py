"""The section of ``bench_matrix.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import charts
from sections.page import facts, markdown_table

__all__ = ["section", "section_tf32"]

MATRIX = """
## How do the costs depend on network, batch and number of layers?

[bench_matrix.py](bench_matrix.py): milliseconds, median / 99th percentile, and the most memory that
one call adds, in MiB{device}. Random weights; {seconds:.0f} s for each column.
Machine: {facts}.
{tables}"""

PICTURE = """
The chart shows when the device was busy during one call, for resnet50 `avgpool` at batch 1:

![Kernels of each method over time](results/kernels.png)
"""

MATRIX_TF32 = """
## The same with TF32

The same benchmark with `--tf32`: float32 convolutions and matrix products may use TF32, which a
server allows only with its [flag](../docs/performance.md#on-a-gpu). Machine: {facts}.
{tables}"""

DEVICE = "; times are measured on the host until the device has finished, in brackets on the device"


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    gpu = results["machine"]["gpu"]
    tables = []
    for title, columns in results["tables"].items():
        names = list(dict.fromkeys(name for column in columns.values() for name in column))
        rows = [
            [name, *(_costs(column.get(name)) for column in columns.values())] for name in names
        ]
        tables.append(f"\n**{title}**\n\n{markdown_table(['method', *columns], rows)}\n")
        if gpu:
            rows = [[n, *(_kernels(column.get(n)) for column in columns.values())] for n in names]
            tables.append(
                "\nKernels and copies of one call; milliseconds in which the device was busy + "
                f"idle between them:\n\n{markdown_table(['method', *columns], rows)}\n"
            )
    charts.bars(
        folder / "matrix.png",
        {
            f"{title}, deep": {name: row["p50"] for name, row in columns["deep"].items()}
            for title, columns in results["tables"].items()
            if "deep" in columns
        },
    )
    return MATRIX.format(
        device=DEVICE if results["machine"]["gpu"] else "",
        seconds=results["seconds"],
        facts=facts(results["machine"]),
        tables="".join(tables)
        + "\n![Milliseconds of each method for one deep layer](results/matrix.png)\n"
        + (PICTURE if gpu else ""),
    )


def section_tf32(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    tables = []
    for title, columns in results["tables"].items():
        names = list(dict.fromkeys(name for column in columns.values() for name in column))
        rows = [[n, *(_costs(column.get(n)) for column in columns.values())] for n in names]
        tables.append(f"\n**{title}**\n\n{markdown_table(['method', *columns], rows)}\n")
    return MATRIX_TF32.format(facts=facts(results["machine"]), tables="".join(tables))


def _kernels(row: dict[str, float] | None) -> str:
    if row is None or "kernels" not in row:
        return "–"
    times = f"{charts.digits(row['busy_ms'])} + {charts.digits(row['gaps_ms'])}"
    return f"{row['kernels']:.0f}: {times}"


def _costs(row: dict[str, float] | None) -> str:
    if row is None:
        return "–"
    device = f" ({charts.digits(row['device_p50'])})" if "device_p50" in row else ""
    times = f"{charts.digits(row['p50'])}{device} / {charts.digits(row['p99'])}"
    return f"{times}, {row['peak_mib']:.0f} MiB"
