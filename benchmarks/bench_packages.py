"""Does EXPORT keep other threads waiting, and how soon does a restart answer from its packages?

First, one process runs passes of resnet50 that take some hundred milliseconds, while another thread
sleeps a millisecond at a time and notes how long each sleep really took: what is above a
millisecond, that thread was kept waiting. The passes are those of HOOK, TORCHSCRIPT and EXPORT, and
of the same layer compiled by ``torch._inductor`` and run by its own loader. All values are compared
with HOOK's first, and all ways take turns.

Then processes of their own load resnet50, with the packages of an earlier one in the plan cache and
no compiler on the PATH, and ask EXPORT for the layer. The weights are random, from a file.

    python benchmarks/bench_packages.py
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision

import common
import layertap
from layertap.extraction.verify import compiled_tolerance, difference
from layertap.models import ModelSpec, load_model

NET, LAYER = "resnet50", "avgpool"
WAYS = ("hook", "torchscript", "export")
TORCHS_OWN = "torch's own loader"
IDLE = "no pass"
COMPILERS = ("g++", "c++", "gcc", "cc", "clang", "clang++")
SLEEP = 0.001
IDLE_SECONDS = 0.3


class Watcher:
    """A thread that notes how late it wakes from its sleeps, in milliseconds."""

    def __init__(self) -> None:
        self._late: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> list[float]:
        self._thread.start()
        return self._late

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            begun = time.perf_counter()
            time.sleep(SLEEP)
            self._late.append(max(0.0, 1000 * (time.perf_counter() - begun - SLEEP)))


def stalls(weights: Path, cache: Path, *, batch: int, rounds: int) -> dict[str, Any]:
    """Measure how long another thread waits during passes."""
    from bench_export import Package  # Imports the compiler, which restarted processes don't need.

    x = torch.rand(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    spec = ModelSpec(NET, weights=str(weights))
    with layertap.load(NET, weights=str(weights), device="cpu", plan_cache=cache) as model:
        own = Package(load_model(spec, "cpu"), LAYER, weights.parent)
        ways: dict[str, Callable[[], torch.Tensor]] = {
            way: lambda way=way: model.extract(x, [LAYER], extractor=way)[LAYER] for way in WAYS
        }
        ways[TORCHS_OWN] = lambda: own(x)
        truth = ways["hook"]()
        for name, way in ways.items():
            error = difference(way(), truth)
            if error > compiled_tolerance(truth):
                raise SystemExit(f"{name} is wrong by {error:.1e}")
            for _ in range(3):
                way()
        found: dict[str, dict[str, list[float]]] = {
            name: {"pass": [], "late": [], "latest": []} for name in (IDLE, *ways)
        }
        for _ in range(rounds):
            for name, row in found.items():
                run = ways.get(name, lambda: time.sleep(IDLE_SECONDS))
                with Watcher() as late:
                    begun = time.perf_counter()
                    run()
                    row["pass"].append(1000 * (time.perf_counter() - begun))
                row["late"].extend(late)
                row["latest"].append(max(late, default=0.0))
    return {
        name: {
            "pass_ms": common.quantiles(row["pass"]),
            "late_ms": common.quantiles(row["late"]),
            "latest_ms": max(row["latest"]),
            "latest_of_a_pass_ms": statistics.median(row["latest"]),
        }
        for name, row in found.items()
    }


def child(weights: Path, cache: Path) -> None:
    """Load the model, ask EXPORT, and print how long each step took."""
    compilers = [name for name in COMPILERS if shutil.which(name)]
    if compilers or os.environ.get("CXX"):
        raise SystemExit(f"this process can find a compiler: {compilers}")
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    begun = time.perf_counter()
    with layertap.load(NET, weights=str(weights), device="cpu", plan_cache=cache) as model:
        loaded = time.perf_counter()
        value = model.extract(x, [LAYER], extractor="export")[LAYER]
        answered = time.perf_counter()
        truth = model.extract(x, [LAYER], extractor="hook")[LAYER]
        if difference(value, truth) > compiled_tolerance(truth):
            raise SystemExit("EXPORT is wrong after a restart")
        print(json.dumps({"load": loaded - begun, "first answer": answered - loaded}))


def restarts(weights: Path, cache: Path, times: int) -> dict[str, Any]:
    """Start processes without a compiler; return how long each step took, in seconds."""
    steps: dict[str, list[float]] = {}
    environment = {key: value for key, value in os.environ.items() if key != "CXX"}
    environment["PATH"] = str(weights.parent / "no compiler")  # A folder that is not there.
    for _ in range(times + 1):
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "--child", weights, cache],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        row = json.loads(done.stdout.splitlines()[-1])
        row["the whole process, with imports and a comparison"] = time.perf_counter() - begun
        row["load and first answer"] = row["load"] + row["first answer"]
        for step, seconds in row.items():
            steps.setdefault(step, []).append(seconds)
    return {step: common.quantiles(seconds[1:]) for step, seconds in steps.items()}


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--restarts", type=int, default=7)
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        weights, cache = Path(folder) / "weights.pth", Path(folder) / "cache"
        torch.manual_seed(0)
        torch.save(torchvision.models.resnet50().state_dict(), weights)
        waits = stalls(weights, cache, batch=options.batch, rounds=options.rounds)
        print(json.dumps(waits, indent=2), flush=True)
        steps = restarts(weights, cache, options.restarts)
    results = {
        "machine": common.machine("torch"),
        "batch": options.batch,
        "rounds": options.rounds,
        "restarts": options.restarts,
        "stalls": waits,
        "seconds": steps,
    }
    print(json.dumps(steps, indent=2))
    import report  # Not for restarted processes, whose imports are timed.

    common.save("packages", results)
    report.write()


if __name__ == "__main__":
    main()
