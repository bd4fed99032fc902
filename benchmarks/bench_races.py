"""Is AUTO as fast as the best single extractor, once it has raced them?

For each model, one shallow and one deep layer, and two batch sizes: AUTO is asked until its race is
over, and then takes turns with every extractor that raced, in this process, through the engine.
With ``--export``, the program of EXPORT races as well. The values of all are compared first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import common
import layertap
import report
from layertap import LocalModel
from layertap.engine.races import RACE_AFTER
from layertap.extraction.verify import compiled_tolerance, difference

LAYERS = {
    "resnet18": ("layer1", "avgpool"),
    "resnet50": ("layer1", "avgpool"),
    "vgg11_bn": ("features.7", "classifier.3"),
    "densenet121": ("features.transition1", "features"),
    "mobilenet_v3_large": ("features.4", "avgpool"),
    "efficientnet_b0": ("features.2", "avgpool"),
    "vit_b_16": ("encoder.layers.encoder_layer_1", "encoder.ln"),
}
SIZES = (1, 8)
AUTO = "auto"
PATIENCE = 600


def raced(model: LocalModel, x: torch.Tensor, layer: str) -> str:
    """Ask AUTO until its race for a layer and a batch size is over; return the result in words."""
    size = len(x)
    about = f"AUTO, {layer}, about {size} item{'s' if size > 1 else ''}: "
    ends = time.monotonic() + PATIENCE
    for _ in range(RACE_AFTER + 1):
        model.extract(x, layer)
    while time.monotonic() < ends:
        found = [note for note in model.describe().notes if note.startswith(about)]
        if found:
            return found[0].removeprefix(about)
        time.sleep(0.05)
    raise SystemExit(f"{layer}: no race of {size} items was over after {PATIENCE} seconds")


def row(model: LocalModel, layer: str, size: int, rounds: int, ways: list[str]) -> dict[str, Any]:
    """Race, compare, and time one layer at one batch size."""
    shape = model.describe().inputs[0].shape[1:]
    x = torch.rand(size, *(part.size for part in shape), generator=torch.Generator().manual_seed(1))
    words = raced(model, x, layer)

    def call(way: str) -> Callable[[], Mapping[str, torch.Tensor]]:
        return lambda: model.extract(x, layer, extractor=way)

    right = model.extract(x, layer, extractor="hook")[layer]
    for way in ways:
        error = difference(call(way)()[layer], right)
        if error > compiled_tolerance(right):
            raise SystemExit(f"{layer} by {way}: {error} from the hook's value")
    times: dict[str, list[float]] = {way: [] for way in ways}
    ratios: dict[str, list[float]] = {way: [] for way in ways if way != AUTO}
    for turn in range(rounds):
        for way in ways if turn % 2 else ways[::-1]:
            times[way].append(min(common.timed(call(way), 3)))
        for way, of_turns in ratios.items():
            of_turns.append(times[AUTO][-1] / times[way][-1])
    best = min(ratios, key=lambda way: statistics.median(times[way]))
    return {
        "layer": layer,
        "items": size,
        "race": words,
        "milliseconds": {way: common.quantiles(taken) for way, taken in times.items()},
        "best": best,
        "AUTO / best, by round": common.quantiles(ratios[best]),
    }


def run(nets: list[str], rounds: int, export: bool) -> dict[str, Any]:
    """Measure all rows."""
    rows: dict[str, Any] = {}
    ways = [AUTO, "torchscript", "hook", *(["export"] if export else [])]
    for net in nets:
        with layertap.load(net, weights="random", device="cpu", layers=list(LAYERS[net])) as model:
            for layer in LAYERS[net]:
                for size in SIZES:
                    if export:
                        shape = [part.size for part in model.describe().inputs[0].shape[1:]]
                        model.extract(torch.rand(size, *shape), layer, extractor="export")
                    found = row(model, layer, size, rounds, ways)
                    rows[f"{net} {layer}, {size}"] = found
                    ratio = found["AUTO / best, by round"]
                    print(
                        f"{net} {layer} {size}: best {found['best']}, AUTO / best "
                        f"{ratio['p50']:.3f} ({ratio['p25']:.3f} to {ratio['p75']:.3f}); "
                        f"{found['race']}",
                        flush=True,
                    )
    return {"rounds": rounds, "threads": torch.get_num_threads(), "rows": rows}


def main() -> None:
    """Run the benchmark, and write its results and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="*", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--export", action="store_true", help="EXPORT takes part: needs a compiler")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    results = run(options.nets, options.rounds, options.export)
    machine = common.machine("torch", "torchvision")
    common.save("races", {"machine": machine, **results}, options.results)
    report.write(options.results)


if __name__ == "__main__":
    main()
