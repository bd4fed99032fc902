"""The section of ``bench_sentences.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sections.page import facts, markdown_table

__all__ = ["section"]

SENTENCES = """
## How many sentences of mixed length a second?

[bench_sentences.py](bench_sentences.py) (`make bench-sentences`): 1,000 sentences of {shortest} to
{longest} tokens, {all} in all, and an encoder of the shape of all-MiniLM-L6-v2 with random weights,
relative to sentence-transformers in process; medians of {turns} turns. The servers run in processes
of their own on the same cores, over gRPC on TCP. Machine: {facts}.

{table}
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    rows = [
        [way, f"{row['items a second']:.0f}", f"{row['relative']:.2f}×",
         f"{row['largest difference']:.0e}"]
        for way, row in results["ways"].items()
    ]  # fmt: skip
    return SENTENCES.format(
        **results["tokens"],
        turns=results["turns"],
        facts=facts(results["machine"]),
        table=markdown_table(["", "sentences a second", "relative", "largest difference"], rows),
    )
