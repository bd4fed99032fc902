"""The section of ``bench_plain_beside.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sections.page import facts, markdown_table, quartiles

__all__ = ["section"]

PLAIN_BESIDE = """
## Are plain requests as fast as before there were gradients and interventions?

[bench_plain_beside.py](bench_plain_beside.py): resnet18 with random weights, a tensor of one image.
Milliseconds of a lone caller, median (quartiles) of {rounds} rounds of {calls} calls. The servers
of the commits {before} (before) and {now} (now) take turns. Both are asked with the client of now,
and the former server with the client of its own commit as well, which could not yet choose between
servers. The bits of {compared} plain replies were compared first: all are equal. Ratios are the
medians (quartiles) of those of the rounds. Then {threads} threads mixed {requests} requests of
{kinds} kinds, plain ones, gradients and interventions: {wrong} replies differed from those of the
same request alone. Machine: {facts}.

{table}
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    servers, with_clients = "before", "before, with its own client"
    rows = [
        [
            name,
            *(quartiles(row[side]) for side in (servers, with_clients, "now")),
            *(
                "{p50:.3f} ({p25:.3f}–{p75:.3f})".format(
                    **row["now beside"][side]["ratio, by round"]
                )
                for side in (servers, with_clients)
            ),
        ]
        for name, row in results["milliseconds"].items()
    ]
    head = ["", servers, with_clients, "now", "the server: now / before", "with the clients"]
    return PLAIN_BESIDE.format(
        rounds=results["rounds"],
        calls=results["calls in a turn"],
        **results["commits"],
        compared=results["plain replies of equal bits"],
        **results["mixed"],
        facts=facts(results["machine"]),
        table=markdown_table(head, rows),
    )
