"""The section of ``bench_text.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sections.page import facts, markdown_table, quartiles

__all__ = ["section"]

TEXT = """
## How much time does the server add to a pass of BERT-base?

[bench_text.py](bench_text.py): BERT-base from its configuration, {tokens} tokens, one item; a
client on the server's machine, through shared memory. The pass is plain PyTorch in a process of
its own, cut after the last layer that is asked for, with as many threads. The floor is a request
for the smallest layer of a tiny model. Milliseconds, median (quartiles); all rows alternate.
Machine: {facts}, threads {threads}.

{table}

The states of all 12 layers, 18.9 MB, take {ratios} the time of the pass. The last token of one
layer takes {overheads} longer than the pass and the floor together.
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    rows = [[name, quartiles(row)] for name, row in results["milliseconds"].items()]
    ratios = [f"{each['p50']:.2f}× ({name})" for name, each in results["ratios"].items()]
    over = results["last token, over the pass and the floor"]
    return TEXT.format(
        tokens=results["tokens"],
        threads=results["threads"],
        facts=facts(results["machine"]),
        table=markdown_table(["", "milliseconds"], rows),
        ratios=" and ".join(ratios),
        overheads=" and ".join(f"{value:.1f} ms ({name})" for name, value in over.items()),
    )
