"""The section of ``bench_branches.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sections.page import facts, markdown_table, quartiles

__all__ = ["section"]

BRANCHES = """
## How much faster than HOOK is a compiled transformer that looks at its mask?

[bench_branches.py](bench_branches.py): BERT-base from its configuration, {tokens} tokens, one
item, the outputs of all {layers} layers; milliseconds, median (quartiles) of {turns} calls that
alternate. The time of TORCHSCRIPT includes its guard, which finds out the outcome of the mask
([Branches](../docs/extraction.md#branches)). The speed-up is the median (quartiles) of the ratios
of the turns. Machine: {facts}, threads {threads}.

{speed}

How many of the layers that HOOK serves a compiled plan serves as well, in small models of each
architecture, and how its values compare with plain hooks': without a mask, with a mask of ones,
and with padding at either end, for one item and for two:

{shares}
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    speed = [
        [
            title,
            *(quartiles(row) for row in each["ways"].values()),
            quartiles(each["guard"]),
            f"{quartiles(each['speed-up, by turn'])}",
        ]
        for title, each in results["batches"].items()
    ]
    ways = next(iter(results["batches"].values()))["ways"]
    shares = [
        [
            name,
            f"{each['of TORCHSCRIPT']} of {each['layers of HOOK']}",
            str(each["values compared"]),
            str(each["wrong"]),
        ]
        for name, each in results["architectures"].items()
    ]
    return BRANCHES.format(
        tokens=results["tokens"],
        layers=results["layers"],
        turns=results["turns"],
        threads=results["threads"],
        facts=facts(results["machine"]),
        speed=markdown_table(["", *ways, "its guard alone", "speed-up"], speed),
        shares=markdown_table(
            ["model", "layers of TORCHSCRIPT", "values compared", "wrong"], shares
        ),
    )
