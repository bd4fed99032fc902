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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import common
import report
from layertap import Client
from layertap.extraction.samples import ordinary_batch
from layertap.models import ModelSpec, load_model
from ways import Way, Ways

CASES = {
    "resnet18": {"layer1": ["layer1"], "avgpool": ["avgpool"], "5 stages": [
        "relu", "layer1", "layer2", "layer3", "layer4",
    ]},
    "vgg16_bn": {"3 pools": ["features.23", "features.33", "features.43"]},
}  # fmt: skip
SERVED = "client of a server, AUTO"


@contextmanager
def served(name: str, layers: list[str], x: np.ndarray) -> Iterator[Way]:
    """Serve the layers from a process of its own, and yield a call to it."""
    command = [sys.executable, "-m", "layertap", "serve", name, "--weights", "random"]
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
        measured = Ways(model)
        x = ordinary_batch(model, 1)
        for title, layers in cases.items():
            with torch.inference_mode():
                times = time_in_turns(measured.of(layers, x), rounds)
            # Not among the turns: two processes with two threads each would fight for the cores.
            with served(name, layers, x.only.numpy()) as call:
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
