"""What does each way to take a layer cost, and what is left of the fastest through the server?

``make bench`` runs it and writes ``results/extractors.json``. Every output is held against the
eager model before anything is timed. The ways take turns, so that a machine whose speed drifts
slows all of them alike; quote the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import common
import report
from layertap import Client, Extractor
from layertap.extraction import CapturePoint, PlanBuilder, Taps, measure
from layertap.extraction.verify import TORCHSCRIPT_TOLERANCE, difference
from layertap.models import LoadedModel, ModelSpec, load_model
from layertap.selection import Capture

CASES = {
    "resnet18": {"layer1": ["layer1"], "avgpool": ["avgpool"], "5 stages": [
        "relu", "layer1", "layer2", "layer3", "layer4",
    ]},
    "vgg16_bn": {"3 pools": ["features.23", "features.33", "features.43"]},
}  # fmt: skip
EAGER = "full eager pass with cloning hooks"
SERVED = "client of a server, AUTO"

Way = Callable[[], Any]


def ways_of(model: LoadedModel, layers: list[str], x: torch.Tensor) -> dict[str, Way]:
    """Return every way to take these layers in this process, each proven right."""
    catalogue = measure(model)
    points = [catalogue.entry(layer).points[Capture.OUTPUT] for layer in layers]
    builder = PlanBuilder(model, Taps(model.module), catalogue)
    ways: dict[str, Way] = {EAGER: lambda: eager(model, layers, x)}
    truth = eager(model, layers, x)
    for extractor in Extractor:
        able = all(
            catalogue.entry(layer).support.get(extractor, None)
            and catalogue.entry(layer).serves(extractor, Capture.OUTPUT)
            for layer in layers
        )
        if not able:
            continue
        built = builder.build(extractor, points, tuple(x.shape[1:])).built
        ways[extractor.name] = lambda built=built: captured(built, points, x)
        check(extractor, ways[extractor.name](), truth)
    return ways


def eager(model: LoadedModel, layers: list[str], x: torch.Tensor) -> list[torch.Tensor]:
    """Today's habit: register hooks, run the whole model, remove them."""
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            kept[name] = output.clone()

        return hook

    handles = [model.module.get_submodule(n).register_forward_hook(keep(n)) for n in layers]
    model.forward(x)
    for handle in handles:
        handle.remove()
    return [kept[name] for name in layers]


def captured(built: Any, points: list[CapturePoint], x: torch.Tensor) -> list[torch.Tensor]:
    """Run an extractor and keep a clone of every value, as the server's copy into its reply is."""
    kept: dict[int, torch.Tensor] = {}
    built.run(x, lambda index, value: kept.__setitem__(index, value.clone()))
    return [kept[index] for index in range(len(points))]


def check(extractor: Extractor, values: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    """Stop the benchmark where a way is wrong: a wrong answer has no speed."""
    compiled = extractor is Extractor.TORCHSCRIPT
    tolerance = TORCHSCRIPT_TOLERANCE[torch.float32] if compiled else 0.0
    errors = [difference(a, b) for a, b in zip(values, truth, strict=True)]
    if max(errors) > tolerance:
        raise SystemExit(f"{extractor.name} is wrong by {max(errors):.1e}")


@contextmanager
def served(name: str, layers: list[str], x: np.ndarray) -> Iterator[Way]:
    """Serve the layers from a process of its own, and yield a call to it."""
    command = [sys.executable, "-m", "layertap.cli.main", "serve", name, "--weights", "random"]
    command += ["--layers", ",".join(layers), "--port", "0", "--metrics-port", "-1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if "serving" in line)
            with Client(line.split()[-1]) as client:
                yield lambda: client.extract(name, x, layers)
        finally:
            process.terminate()


def time_in_turns(ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Return each way's times in milliseconds, the ways taking turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 3):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            if round_ >= 3:
                times[name].append((time.perf_counter() - begun) * 1000)
    return times


def run(rounds: int) -> dict[str, Any]:
    """Time every case; return the results with the machine's facts."""
    results: dict[str, Any] = {"machine": machine(), "rounds": rounds, "cases": {}}
    for name, cases in CASES.items():
        model = load_model(ModelSpec(name, weights="random"))
        x = torch.rand(1, *model.input.item_shape)
        for title, layers in cases.items():
            with torch.inference_mode():
                times = time_in_turns(ways_of(model, layers, x), rounds)
            # Not among the turns: two processes with two threads each would fight for the cores.
            with served(name, layers, x.numpy()) as call:
                times |= time_in_turns({SERVED: call}, rounds)
            results["cases"][f"{name} {title}"] = {
                way: {"p50": statistics.median(t), "p99": float(np.percentile(t, 99))}
                for way, t in times.items()
            }
            print(title, {way: round(statistics.median(t), 1) for way, t in times.items()})
    return results


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    return common.machine("torch") | {
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    common.save("extractors", run(options.rounds))
    report.write()


if __name__ == "__main__":
    main()
