"""What does each way cost by network, layer set, batch and device, in time and in memory?

Four networks; one shallow layer, one deep, many, and every one; every way in turns, each verified
before it is timed. The highest memory is that of one call over what was in use before. On a GPU
the times are the host's, from the call until the device has finished, and the device's own, by
events around the call: where both agree the device is the bottleneck, else the kernels' launches.
One more call runs under the profiler, which counts kernels and the gaps between them.
There HOOK and TORCHSCRIPT are CUDA graphs as well, where they can be recorded, and copies to the
host that block stand beside those that don't.

    python benchmarks/bench_matrix.py --device cuda --batches 1 8 32 --results build/bench-cuda
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import charts
import common
import kernels
import peaks
import report
from layertap import keep_memory
from layertap.engine import allow_tf32
from layertap.extraction.samples import ordinary_batch
from layertap.models import ModelSpec, load_model
from ways import EAGER, GRAPH, Way, Ways

LAYERS = {
    "resnet18": {"shallow": ["layer1"], "deep": ["avgpool"], "many": ["relu", "layer?"]},
    "resnet50": {"shallow": ["layer1"], "deep": ["avgpool"], "many": ["relu", "layer?"]},
    "vgg16_bn": {
        "shallow": ["features.6"],
        "deep": ["avgpool"],
        "many": [f"features.{index}" for index in (6, 13, 23, 33, 43)],
    },
    "vit_b_16": {
        "shallow": ["encoder.layers.encoder_layer_0"],
        "deep": ["encoder.ln"],
        "many": ["encoder.layers.*"],
    },
}
EVERY = {"every": ["**"]}
PICTURED = "resnet50, batch 1", "deep"
"""The network, batch and layer set whose kernels are drawn along the time."""
PICTURED_WAYS = [EAGER, "FX", "HOOK", "TORCHSCRIPT", GRAPH.format("TORCHSCRIPT")]


class Clock:
    """Times calls, and knows how to wait for the device."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def once(self, way: Way) -> dict[str, float]:
        """Return a call's milliseconds: the host's, and on a GPU the device's."""
        if not self.cuda:
            begun = time.perf_counter()
            way()
            return {"host": (time.perf_counter() - begun) * 1000}
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begun = time.perf_counter()
        first.record()
        way()
        last.record()
        torch.cuda.synchronize()
        host = (time.perf_counter() - begun) * 1000
        return {"host": host, "device": first.elapsed_time(last)}

    def peak(self, way: Way) -> float:
        """Return the MiB that one call adds to what is in use."""
        if not self.cuda:
            return peaks.added_by(way) / peaks.MIB
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / peaks.MIB


def measure_ways(
    ways: dict[str, Way], clock: Clock, rounds: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Time ways in turns until there are enough rounds or the time is over, three at least."""
    for way in ways.values():
        way()
    times: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    ends = time.monotonic() + seconds
    for round_ in range(rounds):
        if round_ >= 3 and time.monotonic() > ends:
            break
        for name, way in ways.items():
            times[name].append(clock.once(way))
    return {name: _summary(taken) | {"peak_mib": clock.peak(ways[name])}
            for name, taken in times.items()}  # fmt: skip


def observe_ways(ways: dict[str, Way]) -> dict[str, list[kernels.Activity]]:
    """Return what the device did in one more call of each way."""
    return {name: kernels.observe(way) for name, way in ways.items()}


def _summary(taken: Sequence[dict[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {"calls": len(taken)}
    for clock in taken[0]:
        prefix = "" if clock == "host" else f"{clock}_"
        quantiles = common.quantiles([each[clock] for each in taken])
        found |= {f"{prefix}{name}": value for name, value in quantiles.items()}
    return found


def run(
    nets: Sequence[str],
    batches: Callable[[str], Sequence[int]],
    sets: Sequence[str],
    clock: Clock,
    *,
    rounds: int,
    seconds: float,
    picture: Path,
    keep: Callable[[dict[str, Any], dict[str, Any]], None],
) -> None:
    """Measure everything; keep the tables by network and batch, and the refusals, as they grow.

    On a GPU the kernels of ``PICTURED`` are drawn into a file. Every layer at once is measured at
    batch 1 only: its values are gigabytes at more.
    """
    device = "cuda" if clock.cuda else "cpu"
    tables: dict[str, Any] = {}
    refused: dict[str, Any] = {}
    for net in nets:
        model = load_model(ModelSpec(net, weights="random"), device)
        measured = Ways(model)
        for batch in batches(net):
            x = ordinary_batch(model, batch)
            table = tables.setdefault(f"{net}, batch {batch}", {})
            for title in sets:
                if title in EVERY and batch > 1 and clock.cuda:
                    continue
                ways = measured.of((LAYERS[net] | EVERY)[title], x)
                table[title] = measure_ways(ways, clock, rounds, seconds)
                if measured.refused:
                    refused[f"{net}, batch {batch}, {title}"] = dict(measured.refused)
                if clock.cuda:
                    seen = observe_ways(ways)
                    for way, activities in seen.items():
                        table[title][way] |= kernels.summary(activities)
                    if (f"{net}, batch {batch}", title) == PICTURED:
                        drawn = {way: seen[way] for way in PICTURED_WAYS if way in seen}
                        charts.timeline(picture, drawn)
                shown = {way: round(row["p50"], 2) for way, row in table[title].items()}
                print(f"{net}, batch {batch}, {title}: {shown} {measured.refused}", flush=True)
                keep(tables, refused)


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--nets", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--batches", nargs="+", type=int, help="1, and for resnet18 8 and 32 too")
    parser.add_argument("--sets", nargs="+", default=[*LAYERS["resnet18"], *EVERY])
    parser.add_argument("--tf32", action="store_true", help="allow TF32 on the GPU")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--seconds", type=float, default=4, help="for a layer set, three rounds at least"
    )
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    keep_memory()  # As the server does by itself.
    clock = Clock(options.device)
    allow_tf32(options.tf32)

    def batches(net: str) -> Sequence[int]:
        return options.batches or ([1, 8, 32] if net == "resnet18" else [1])

    facts = common.machine("torch", "torchvision") | {
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if clock.cuda else None,
        "float32": ("TF32" if options.tf32 else "IEEE") if clock.cuda else None,
    }

    def keep(tables: dict[str, Any], refused: dict[str, Any]) -> None:
        found = {"machine": facts, "seconds": options.seconds, "tables": tables, "refused": refused}
        common.save("matrix_tf32" if options.tf32 else "matrix", found, options.results)

    with torch.inference_mode():
        run(
            options.nets, batches, options.sets, clock, rounds=options.rounds,
            seconds=options.seconds, picture=options.results / "kernels.png", keep=keep,
        )  # fmt: skip
    report.write(options.results)


if __name__ == "__main__":
    main()
