"""The section of ``bench_packages.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sections.page import facts, markdown_table, quartiles

__all__ = ["section"]

PACKAGES = """
## Does EXPORT keep other threads waiting, and how soon does it answer after a restart?

[bench_packages.py](bench_packages.py): {batch} items of resnet50 up to `avgpool` in this process,
while another thread sleeps a millisecond at a time. How late it woke, in milliseconds, tells for
how long it got no turn, because of the GIL or because the cores were busy. Median (quartiles) of
{rounds} passes in turns; the values were compared first. Machine: {facts}.

{table}

Restarted {restarts} times, with the package in the plan cache and no compiler on the `PATH`;
seconds, median (quartiles):

{restarted}
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    table = [
        [
            name if name in ("no pass", "torch's own loader") else name.upper(),
            quartiles(row["pass_ms"]),
            f"{row['latest_of_a_pass_ms']:.1f}",
            f"{row['latest_ms']:.1f}",
            quartiles(row["late_ms"]),
        ]
        for name, row in results["stalls"].items()
    ]
    return PACKAGES.format(
        batch=results["batch"],
        rounds=results["rounds"],
        restarts=results["restarts"],
        facts=facts(results["machine"]),
        table=markdown_table(
            ["", "a pass", "latest, median of the passes", "latest of all", "all sleeps"], table
        ),
        restarted=markdown_table(
            ["", "s"], [[step, quartiles(row)] for step, row in results["seconds"].items()]
        ),
    )
