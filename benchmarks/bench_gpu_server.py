"""What does the server add on a GPU, and which share of a loop without a server do callers get?

The loop is the least that a program of one's own would do: a CUDA graph of the compiled plan, with
the input copied from page-locked memory to the device and the layer back to page-locked memory for
each batch. The server records the same plan at the same batch sizes. The loop and the server are
processes of their own and take turns on the device; every value is held against the loop's before
anything is timed. Callers are several client processes on the server's machine, with shared memory
where the client chooses it.

Then large replies: a pass whose reply is 12.8 or 102 MB, beside the bare copy of as many bytes from
the device to page-locked memory and within the host's memory.

    python benchmarks/bench_gpu_server.py --device cuda --results benchmarks/cuda
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import common
import report
from callers import PHOTO, Callers, tensor
from layertap import Client, keep_memory
from layertap.engine import allow_tf32
from layertap.errors import ExtractorUnsupportedError
from layertap.extraction import PlanBuilder, Taps, measure
from layertap.extraction.pass_spec import PassSpec
from layertap.models import Batch, BatchKey, ModelSpec, load_model
from layertap.selection import Capture, Extractor

NET, LAYER = "resnet50", "avgpool"
LARGE_NET, LARGE_LAYER = "resnet18", "layer1"
LARGE = {"12.8 MB": 16, "102 MB": 128}
"""Batch sizes at which the layer ``[B, 64, 56, 56] float32`` has as many bytes."""
CALLERS = (1, 2, 4, 8, 16, 64)
BATCHES = (1, 8, 32)
GRAPHS = (1, 2, 4, 8, 16, 32)

CONFIG = """
[server]
host = "127.0.0.1"
port = 0
metrics_port = -1
device = "{device}"
plan_cache = "off"
{server}
[limits]
pending = 256
request_mib = 512
[[models]]
source = "{net}"
weights = "random"
layers = ["{layer}"]
cuda_graphs = {graphs}
max_batch_size = {together}
[[models]]
source = "{large_net}"
weights = "random"
layers = ["{large_layer}"]
"""


class Loop:
    """The compiled plan of one layer in this process, as a CUDA graph where there is a GPU."""

    def __init__(self, net: str, layer: str, device: str, sizes: tuple[int, ...]) -> None:
        model = load_model(ModelSpec(net, weights="random"), device)
        catalogue = measure(model)
        pass_spec = PassSpec((catalogue.entry(layer).points[Capture.OUTPUT],))
        builder = PlanBuilder(model, Taps(model.module), catalogue)
        self._plan = self._best(builder, pass_spec, model.signature.key)
        self.extractor = self._plan.extractor.name
        self.graphs: list[int] = []
        self._cuda = device == "cuda"
        if self._cuda:
            self._plan, self.graphs = builder.prover.record(self._plan, sizes)
        self._device = device
        self._name = model.signature.main.name
        self._host: dict[int, torch.Tensor] = {}

    @staticmethod
    def _best(builder: PlanBuilder, pass_spec: PassSpec, key: BatchKey) -> Any:
        try:
            return builder.build(Extractor.TORCHSCRIPT, pass_spec, key)
        except ExtractorUnsupportedError as refusal:
            print(refusal, flush=True)
            return builder.build(Extractor.HOOK, pass_spec, key)

    def once(self, x: torch.Tensor) -> torch.Tensor:
        """Run a batch, page-locked where there is a GPU; return the layer on the host."""
        given = Batch({self._name: x.to(self._device, non_blocking=True)})
        got: list[torch.Tensor] = []
        self._plan.built.run(given, lambda _, value: got.append(self._copied(value, len(x))))
        if self._cuda:
            torch.cuda.synchronize()
        return got[0]

    def _copied(self, value: torch.Tensor, batch: int) -> torch.Tensor:
        if not self._cuda:
            return value.clone()
        if batch not in self._host:
            self._host[batch] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return self._host[batch].copy_(value, non_blocking=True)

    def times(self, batch: int, seconds: float) -> list[float]:
        """Return the milliseconds of each pass of a loop."""
        x = self.batch(batch)
        common.timed(lambda: self.once(x), 10)
        times: list[float] = []
        while sum(times) < seconds * 1000:
            times += common.timed(lambda: self.once(x), 5)
        return times

    def batch(self, size: int) -> torch.Tensor:
        """Return the input that the callers send too."""
        x = torch.from_numpy(tensor(size))
        return x.pin_memory() if self._cuda else x


@contextmanager
def serving(device: str, together: int, tf32: bool) -> Iterator[str]:
    """Serve both nets from a process of its own; yield the address once it is ready."""
    text = CONFIG.format(
        device=device, net=NET, layer=LAYER, graphs=list(GRAPHS), together=together,
        large_net=LARGE_NET, large_layer=LARGE_LAYER, server="tf32 = true" if tf32 else "",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "layertap.toml"
        file.write_text(text, "utf-8")
        command = [sys.executable, "-W", "ignore", "-m", "layertap", "serve", "--config", str(file)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                said = []
                for line in process.stderr:
                    said.append(line)
                    if "serving" in line:
                        break
                else:
                    raise SystemExit("".join(said))
                print("".join(said[:-1]), end="", flush=True)
                yield line.split()[-1]
            finally:
                process.terminate()


def check(address: str, loop: Loop, large: Loop) -> None:
    """Stop where the server's values are not the loop's."""
    with Client(address, timeout=120) as client:
        for net, layer, mine, sizes in (
            (NET, LAYER, loop, BATCHES),
            (LARGE_NET, LARGE_LAYER, large, LARGE.values()),
        ):
            for size in sizes:
                truth = mine.once(mine.batch(size)).numpy()
                served = client.extract(net, tensor(size), layer)[layer]
                scale = np.abs(truth).max()
                if np.abs(served - truth).max() > 5e-3 * scale:
                    raise SystemExit(f"{net} {layer} at batch {size}: not the loop's values")


def latency(address: str, loop: Loop, rounds: int, seconds: float) -> dict[str, Any]:
    """Time a lone caller and the loop in turns, by batch; and a photograph."""
    times: dict[str, list[float]] = {}
    with Client(address, timeout=60) as client:
        asks: dict[str, Callable[[], Any]] = {
            f"batch {size}": partial(client.extract, NET, tensor(size), LAYER) for size in BATCHES
        }
        asks["photograph"] = partial(client.extract, NET, PHOTO.read_bytes(), LAYER)
        for _ in range(rounds):
            for size in BATCHES:
                times.setdefault(f"batch {size}, loop", []).extend(loop.times(size, seconds))
            for name, ask in asks.items():
                common.timed(ask, 5)
                got: list[float] = []
                while sum(got) < seconds * 1000:
                    got += common.timed(ask, 5)
                times.setdefault(f"{name}, client", []).extend(got)
        found = {name: common.quantiles(taken) | {"calls": len(taken)}
                 for name, taken in times.items()}  # fmt: skip
        for name, ask in asks.items():
            found[f"{name}, client"] |= _parts(ask)
    return found


def _parts(ask: Callable[[], Any]) -> dict[str, float]:
    """Return the medians of the server's own timings, in milliseconds."""
    taken = [ask().timings for _ in range(30)]
    return {
        part: statistics.median(getattr(each, part) for each in taken) / 1e6
        for part in ("prepare_ns", "queue_ns", "compute_ns", "total_ns")
    }


def rates(
    address: str,
    loop: Loop,
    sizes: Sequence[int],
    *,
    rounds: int,
    seconds: float,
    processes: int,
) -> dict[str, dict[str, Any]]:
    """Count what callers get answered a second, by batch, beside the loop, in turns.

    A batch of 0 is a photograph, whose loop is that of a tensor of batch 1.
    """
    found: dict[str, dict[str, list[float]]] = {}
    callers = Callers(address, processes)
    for _ in range(rounds):
        for size in sizes:
            row = found.setdefault(f"batch {size}" if size else "photograph", {})
            median = statistics.median(loop.times(size or 1, seconds))
            row.setdefault("loop", []).append(1000 / median)
            for many in CALLERS:
                got = callers.load(NET, LAYER, many, seconds, batch=size)
                row.setdefault(str(many), []).append(got["rate"])
    callers.close()
    return {
        name: {who: common.quantiles(got) for who, got in row.items()}
        for name, row in found.items()
    }


def large_replies(address: str, loop: Loop, rounds: int) -> dict[str, Any]:
    """Time large replies beside the loop's pass and bare copies of as many bytes."""
    found: dict[str, Any] = {}
    with (
        Client(address, timeout=120) as near,
        Client(address, timeout=120, shared_memory=False) as far,
    ):
        for name, size in LARGE.items():
            x, given = tensor(size), loop.batch(size)
            value = loop.once(given)
            ways: dict[str, Callable[[], object]] = {
                "pass in process, the layer to page-locked memory": lambda g=given: loop.once(g),
                "client, shared memory": lambda x=x: near.extract(LARGE_NET, x, LARGE_LAYER),
                "client, TCP": lambda x=x: far.extract(LARGE_NET, x, LARGE_LAYER),
            }
            ways |= _copies(value, loop)
            times: dict[str, list[float]] = {way: [] for way in ways}
            for call in ways.values():
                common.timed(call, 3)
            for _ in range(rounds):
                for way, call in ways.items():
                    times[way] += common.timed(call, 3)
            found[name] = {
                "bytes": value.nbytes,
                "rows": {way: common.quantiles(taken) for way, taken in times.items()},
            }
    return found


def _copies(value: torch.Tensor, loop: Loop) -> dict[str, Callable[[], object]]:
    source, target = value.numpy(), np.empty(value.shape, np.float32)
    target[...] = source  # Touch the pages before they are timed.
    copies: dict[str, Callable[[], object]] = {
        "memcpy in the host's memory": lambda: np.copyto(target, source)
    }
    if torch.cuda.is_available():
        device, pinned = value.cuda(), torch.empty(value.shape, pin_memory=True)

        def copy() -> None:
            pinned.copy_(device, non_blocking=True)
            torch.cuda.synchronize()

        copies["copy from the device to page-locked memory"] = copy
    return copies


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--together", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--add", action="store_true", help="keep the servers of earlier results")
    parser.add_argument("--tf32", action="store_true", help="allow TF32 on the GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=8, help="client processes at most")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    keep_memory()
    allow_tf32(options.tf32)
    name = "gpu_server_tf32" if options.tf32 else "gpu_server"
    before = options.results / f"{name}.json"
    cuda = options.device == "cuda"
    results: dict[str, Any] = {
        "machine": common.machine("torch", "torchvision", "grpcio")
        | {"gpu": torch.cuda.get_device_name() if cuda else None,
           "float32": "TF32" if options.tf32 else "IEEE"},
        "rounds": options.rounds, "seconds": options.seconds,
    }  # fmt: skip
    with torch.inference_mode():
        loop = Loop(NET, LAYER, options.device, GRAPHS)
        large = Loop(LARGE_NET, LARGE_LAYER, options.device, ())
        results |= {
            "extractor": loop.extractor,
            "graphs": list(GRAPHS),
            "servers": json.loads(before.read_text("utf-8"))["servers"] if options.add else {},
            "loop": f"a CUDA graph at the batch sizes {loop.graphs}",
        }
        for together in options.together:
            with serving(options.device, together, options.tf32) as address:
                check(address, loop, large)
                row = results["servers"][f"max_batch_size {together}"] = {}
                if together == 1:
                    row["latency"] = latency(address, loop, options.rounds, options.seconds)
                    row["large"] = large_replies(address, large, options.rounds * 3)
                row["rates"] = rates(
                    address, loop, (*BATCHES, 0) if together == 1 else (1, 0),
                    rounds=options.rounds, seconds=options.seconds, processes=options.processes,
                )  # fmt: skip
                print(json.dumps(row), flush=True)
            common.save(name, results, options.results)
    report.write(options.results)


if __name__ == "__main__":
    main()
