"""Ask a layertap server for layers of a photograph: client.py HOST:PORT [MODEL].

The server must have resnet18's layers: `layertap serve resnet18 --layers layer1,avgpool`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from layertap import Client, Extractor, Features, LayerSelection, Reduction
from layertap.selection import SelectionLike

PHOTO = Path(__file__).resolve().parent.parent / "images" / "grace_hopper.jpg"
WARM_CALLS = 5

POOLED_HALF = LayerSelection(
    "layer4", reduction=Reduction.GLOBAL_AVERAGE_POOL, dtype="float16", alias="layer4 pooled"
)
BOTH_SIDES = ["avgpool:input", "avgpool"]

REQUESTS: Sequence[tuple[SelectionLike, Extractor]] = [
    ("layer1", Extractor.CHILDREN),
    ("layer1", Extractor.LAYER_GETTER),
    ("layer1", Extractor.FX),
    ("layer1", Extractor.HOOK),
    ("layer1", Extractor.TORCHSCRIPT),
    (BOTH_SIDES, Extractor.HOOK),
    (BOTH_SIDES, Extractor.TORCHSCRIPT),
    (POOLED_HALF, Extractor.AUTO),
    (["bn1", "layer1"], Extractor.AUTO),
]


@dataclass
class Measured:
    """A reply, and the medians of its warm calls in milliseconds."""

    features: Features
    compute_ms: float
    server_ms: float
    round_trip_ms: float


def measure(
    client: Client, model: str, photo: bytes, layers: SelectionLike, extractor: Extractor
) -> Measured:
    """Call once to let the server build what it needs, then time warm calls."""
    client.extract(model, photo, layers, extractor=extractor)
    compute, server, round_trip = [], [], []
    for _ in range(WARM_CALLS):
        begun = time.perf_counter()
        features = client.extract(model, photo, layers, extractor=extractor)
        round_trip.append((time.perf_counter() - begun) * 1e3)
        compute.append(features.timings.compute_ns / 1e6)
        server.append(features.timings.total_ns / 1e6)
    medians = map(statistics.median, (compute, server, round_trip))
    return Measured(features, *medians)


def main() -> None:
    """Measure every request and show what came back."""
    target = sys.argv[1]
    model = sys.argv[2] if len(sys.argv) > 2 else "resnet18"
    photo = PHOTO.read_bytes()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("layer", "shape", "dtype", "extractor"):
        table.add_column(heading, no_wrap=True)
    for heading in ("compute", "server", "call"):
        table.add_column(heading, justify="right")
    with Client(target) as client:
        for layers, extractor in REQUESTS:
            got = measure(client, model, photo, layers, extractor)
            times = (got.compute_ms, got.server_ms, got.round_trip_ms)
            cells = (got.features.extractor.name, *(f"{ms:.1f}" for ms in times))
            for name, array in got.features.items():
                table.add_row(name, str(list(array.shape)), str(array.dtype), *cells)
                cells = ()  # Layers that came together share the one call above.
        both = client.extract(model, photo, ["bn1", "layer1"])

    # `relu` overwrites bn1's output in place: a value below zero is one from before that happened.
    lowest = both["bn1"].min()
    assert lowest < 0, "bn1 came back after the in-place ReLU"
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(
        f"\nTimes are milliseconds, medians of {WARM_CALLS} warm calls. compute: the forward pass "
        f"and writing the reply; server: that, and decoding and preprocessing the JPEG; call: what "
        f"this client waited."
    )
    console.print(
        f"bn1 goes down to {lowest:.2f} although the ReLU after it works in place: layers come as "
        f"they were when they were computed."
    )


if __name__ == "__main__":
    main()
