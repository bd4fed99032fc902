"""Would a plan compiled by AOTInductor be faster than those that layertap has?

TorchScript is deprecated upstream in favour of ``torch.export``, whose programs AOTInductor
compiles ahead of time. This asks what such a plan would be worth. One layer at a time: the model is
exported with a tap that clones the layer's value, with a batch of any size, and compiled to a
package. Its values are compared with those of cloning hooks, and it takes turns with HOOK and
TORCHSCRIPT, on a GPU also with their CUDA graphs and a CUDA graph of the package.

    python benchmarks/bench_export.py --device cuda --results benchmarks/cuda
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import common
import report
from bench_matrix import LAYERS, Clock, measure_ways
from layertap import keep_memory
from layertap.engine import allow_tf32
from layertap.extraction.samples import ordinary_batch
from layertap.extraction.verify import compiled_tolerance, difference
from layertap.models import LoadedModel, ModelSpec, load_model
from ways import EAGER, GRAPH, Way, Ways

NETS = ("resnet18", "resnet50", "vit_b_16")
SETS = ("shallow", "deep")
LARGEST = 64
"""The largest batch that a package takes."""

EXAMPLE = 4
"""The batch that is exported: torch.export takes sizes of 1 for fixed ones."""

EXPORT = "AOTInductor"
KEPT = (EAGER, "HOOK", "TORCHSCRIPT", GRAPH.format("HOOK"), GRAPH.format("TORCHSCRIPT"))
"""The other ways that are timed, where the device has them."""


class Tapped(nn.Module):
    """Returns a clone of one layer's value; what the model computes after it is left out."""

    def __init__(self, net: nn.Module, layer: str) -> None:
        super().__init__()
        self.net = net
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's value."""
        kept: list[torch.Tensor] = []

        def keep(_: nn.Module, __: Any, value: torch.Tensor) -> None:
            kept.append(value.clone())

        handle = self.net.get_submodule(self.layer).register_forward_hook(keep)
        self.net(x)
        handle.remove()
        return kept[0]


class Package:
    """A layer of a model, compiled by AOTInductor.

    Args:
        model: The model.
        layer: The layer's name.
        folder: Where the package is written.

    Attributes:
        seconds: How long the export and the compilation took.
        mib: The size of the package.
    """

    def __init__(self, model: LoadedModel, layer: str, folder: Path) -> None:
        begun = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            x = ordinary_batch(model, EXAMPLE).only.clone()
            sizes = {0: torch.export.Dim("batch", min=1, max=LARGEST)}
            tapped = Tapped(model.module, layer).eval()
            program = torch.export.export(tapped, (x,), dynamic_shapes=(sizes,), strict=False)
            path = folder / f"{model.name}.{layer}.pt2"
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
            self._run = torch._inductor.aoti_load_package(str(path))
        self.seconds = time.perf_counter() - begun
        self.mib = path.stat().st_size / (1 << 20)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Run a batch."""
        value: torch.Tensor = self._run(x)
        return value

    def graph(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Return a call that replays the package's kernels for a batch, and clones the value."""
        given, graph = x.clone(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self(given)
            with torch.cuda.graph(graph, stream=stream):
                value = self(given)
        torch.cuda.current_stream().wait_stream(stream)

        def replay() -> torch.Tensor:
            given.copy_(x)
            graph.replay()
            return value.clone()

        return replay


def verified(way: Way, truth: torch.Tensor) -> float:
    """Return the error of a way; stop if it is wrong, as a wrong answer has no speed."""
    error = difference(way(), truth)
    if error > compiled_tolerance(truth):
        raise SystemExit(f"{EXPORT} is wrong by {error:.1e}")
    return error


def compare(
    model: LoadedModel,
    layer: str,
    batches: list[int],
    clock: Clock,
    *,
    seconds: float,
    folder: Path,
) -> dict[str, Any]:
    """Measure one layer at some batch sizes."""
    package, measured = Package(model, layer, folder), Ways(model)
    print(f"{model.name} {layer}: compiled in {package.seconds:.0f} s", flush=True)
    found: dict[str, Any] = {"seconds": package.seconds, "mib": package.mib, "batches": {}}
    for size in batches:
        x = ordinary_batch(model, size)
        existing = measured.of([layer], x)
        truth = existing[EAGER]()[0]
        ways = {name: way for name, way in existing.items() if name in KEPT}
        ways[EXPORT] = lambda x=x: package(x.only)
        errors = {EXPORT: verified(ways[EXPORT], truth)}
        if clock.cuda:
            name = GRAPH.format(EXPORT)
            ways[name] = package.graph(x.only)
            errors[name] = verified(ways[name], truth)
        table = measure_ways(ways, clock, rounds=400, seconds=seconds)
        best = min(row["p50"] for way, row in table.items() if EXPORT not in way)
        mine = min(row["p50"] for way, row in table.items() if EXPORT in way)
        row = {"ways": table, "errors": errors, "best of the others": best / mine}
        found["batches"][str(size)] = row
        shown = {way: round(row["p50"], 3) for way, row in table.items()}
        print(f"{model.name} {layer}, batch {size}: {shown}", flush=True)
    return found


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(LAYERS))
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=2.0, help="for a layer and a batch size")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    keep_memory()
    allow_tf32(False)
    clock = Clock(options.device)
    results: dict[str, Any] = {
        "machine": common.machine("torch", "torchvision")
        | {"threads": torch.get_num_threads(),
           "gpu": torch.cuda.get_device_name() if clock.cuda else None},
        "seconds": options.seconds, "layers": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for net in options.nets:
            model = load_model(ModelSpec(net, weights="random"), options.device)
            for title in options.sets:
                (layer,) = LAYERS[net][title]
                results["layers"][f"{net}, {layer}"] = compare(
                    model,
                    layer,
                    options.batches,
                    clock,
                    seconds=options.seconds,
                    folder=Path(folder),
                )
                common.save("export", results, options.results)
    ratios = [
        row["best of the others"]
        for layer in results["layers"].values()
        for row in layer["batches"].values()
    ]
    print(f"the best other way takes {statistics.median(ratios):.2f} × as long in the median")
    report.write(options.results)


if __name__ == "__main__":
    main()
