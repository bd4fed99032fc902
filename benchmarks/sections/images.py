"""The section of ``bench_images.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sections.page import facts, markdown_table, quartiles

__all__ = ["section"]

IMAGES = """
## What does a photograph cost?

[bench_images.py](bench_images.py): a photograph adds **{added:.2f} ms** to a call with a tensor
(the difference of the medians; resnet18 `conv1`, pooled). {count} photographs are decoded and
preprocessed **{cores:.2f} ×** as fast by the threads of the server as by one thread. The values
were compared first: all ways give torchvision's, bit for bit. The table has milliseconds
(quartiles); the decoders and the ways from a file to a model's item run on one core. Machine:
{facts}.

{table}
"""


def section(results: dict[str, Any], folder: Path) -> str:
    """Return the text, and draw its chart."""
    parts = {"decode a JPEG, 512 × 600": results["decoders"], **results["ways"]}
    parts[f"{results['count']} of them"] = results["batch"]
    parts["a call"] = results["calls"]
    return IMAGES.format(
        added=results["added_ms"],
        cores=results["cores_ratio"],
        count=results["count"],
        table=markdown_table(
            ["", "", "ms (quartiles)"],
            [
                [part, way, quartiles(row)]
                for part, ways in parts.items()
                for way, row in ways.items()
            ],
        ),
        facts=facts(results["machine"]),
    )
