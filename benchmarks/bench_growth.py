"""How does everything grow: with callers, layers, bytes, items, models, sizes, streams, clients?

One curve for each, with the slope that is expected. The slope is that of a line through the
logarithms: 0 if a cost stays the same, 1 if it doubles with what it depends on. A curve bends if
this slope, or that of its last three points alone, is above the expected one. All requests of a
curve go to one server in a process of its own, and their values are compared first.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

import common
import report
from callers import Callers
from layertap import Client

NET = "resnet18"
ITEM = (3, 64, 64)
LAYER = "layer1"
PROCESSES = 2
"""Of the callers."""

ALL = "**"
SETTLED = 0.25
"""How far a slope may be above the expected one before a curve counts as bent."""

LAST = 3
"""The points at the end of a curve, of which many costs show only there."""

Point = tuple[float, float]


@contextmanager
def serving(models: Sequence[str], *flags: str) -> Iterator[tuple[str, int, float]]:
    """Serve models; yield the address, the process and the seconds until it was ready."""
    command = [sys.executable, "-W", "ignore", "-m", "layertap", "serve", *models]
    command += ["--weights", "random", "--port", "0", "--metrics-port", "-1", *flags]
    begun = time.perf_counter()
    own = common.environment()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=own) as process:
        try:
            assert process.stderr is not None
            address = next(line for line in process.stderr if "serving" in line).split()[-1]
            seconds = time.perf_counter() - begun
            # Or the server would wait until somebody reads its log.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield address, process.pid, seconds
        finally:
            process.terminate()


def small(*more: str) -> tuple[str, ...]:
    """Return the flags of a server of small items, and more flags."""
    return ("--item-shape", ",".join(map(str, ITEM)), "--plan-cache", "off", *more)


def items(count: int) -> np.ndarray:
    """Return a batch ``[count, 3, 64, 64] float32`` in [0, 1)."""
    return np.random.default_rng(0).random((count, *ITEM), dtype=np.float32)


def median_ms(call: Callable[[], object], seconds: float) -> float:
    """Return the median time of a call that is repeated for some seconds, at least three times."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        times += common.timed(call, 1)
    return statistics.median(times)


def slope(points: Sequence[Point]) -> float:
    """Return the slope of the line that fits the logarithms best."""
    xs, ys = ([math.log(p[axis]) for p in points] for axis in (0, 1))
    if len(set(xs)) < 2:
        return 0.0
    middle_x, middle_y = statistics.fmean(xs), statistics.fmean(ys)
    above = sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - middle_x) ** 2 for x in xs)


def proc(pid: int, name: str) -> float:
    """Return a figure of a process's memory in MiB, such as VmHWM or VmRSS."""
    lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def weights_mib(net: str) -> float:
    """Return the size of a net's parameters."""
    module = torchvision.models.get_model(net, weights=None)
    return sum(parameter.nbytes for parameter in module.parameters()) / 2**20


def pass_ms(net: str, shape: Sequence[int]) -> float:
    """Return the median time of a pass of one item of a net, without layertap."""
    module, x = torchvision.models.get_model(net, weights=None).eval(), torch.rand(*shape)
    with torch.no_grad():
        module(x)
        return statistics.median(common.timed(lambda: module(x), 5))


class Curves:
    """Measures and collects curves.

    Args:
        seconds: Seconds for each point.
    """

    def __init__(self, seconds: float) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self._seconds = seconds

    def add(self, name: str, x: str, y: str, expected: float, points: Sequence[Point]) -> None:
        """Keep a curve, and print it."""
        whole, end = slope(points), slope(points[-LAST:])
        self.found[name] = {
            "x": x, "y": y, "expected": expected, "slope": whole, "end": end,
            "bends": max(whole, end) > expected + SETTLED,
            "points": [list(point) for point in points],
        }  # fmt: skip
        print(
            f"{name}: slope {whole:.2f}, at the end {end:.2f}, expected at most {expected:.2f}; "
            f"{points}",
            flush=True,
        )

    def requests(self, most: int) -> None:
        """Measure what depends on requests to one server."""
        with ExitStack() as stack:
            settings = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "settings.toml"
            # By default a server refuses requests where 64 are waiting.
            settings.write_text(f"[limits]\npending = {max(64, 2 * most)}\n", "utf-8")
            flags = small("--layers", LAYER, "--config", str(settings))
            address, _, _ = stack.enter_context(serving([NET], *flags))
            mine = stack.enter_context(Client(address))
            first = mine.extract(NET, items(1), LAYER)[LAYER]
            twice = mine.extract(NET, items(2), LAYER)[LAYER]
            if not np.allclose(first, twice[:1], rtol=1e-4, atol=1e-4):
                raise SystemExit("an item has another value in a batch")
            self._callers(address, most)
            self._layers(mine)
            self._batches(mine)
            self._streams(address)
            self._connections(address, most)

    def _callers(self, address: str, most: int) -> None:
        points = []
        callers = Callers(address, PROCESSES)
        try:
            for count in _doubling(2, most):
                seconds = max(self._seconds, count / 50)
                load = partial(callers.load, NET, LAYER, count, seconds, batch=1, item=ITEM)
                points.append((count, 1000 / load()["rate"]))
        finally:
            callers.close()
        self.add("callers", "callers at once", "ms of the server for each answer", 0.0, points)

    def _layers(self, client: Client) -> None:
        # By HOOK: other layer sets would be compiled meanwhile.
        ask = partial(client.extract, NET, items(1), extractor="hook")
        names = list(ask(ALL))
        by_count, by_bytes = [], []
        for count in sorted({*_doubling(2, len(names)), len(names)}):
            first, whole = names[:count], list({*names[:count], names[-1]})
            size = sum(each.nbytes for each in ask(whole).values())
            by_count.append((count, median_ms(partial(ask, first), self._seconds)))
            by_bytes.append((size / 2**20, median_ms(partial(ask, whole), self._seconds)))
        self.add("layers", "first layers in a reply", "ms", 1.0, by_count)
        # With the last layer, all of them are one pass.
        self.add("bytes", "MiB in a reply of a whole pass", "ms", 1.0, by_bytes)

    def _batches(self, client: Client) -> None:
        points = []
        for size in _doubling(2, 64):
            x = items(size)
            points.append((size, median_ms(partial(client.extract, NET, x, LAYER), self._seconds)))
        self.add("batch", "items in a request", "ms", 1.0, points)

    def _streams(self, address: str) -> None:
        points = []
        for streams in _doubling(4, 16):
            count = max(8, int(100 * self._seconds) // streams)

            def read(_: int, count: int = count) -> int:
                with Client(address) as client:
                    given = (items(1) for _ in range(count))
                    return sum(1 for _ in client.extract_many(NET, given, LAYER))

            with ThreadPoolExecutor(streams) as pool:
                begun = time.perf_counter()
                total = sum(pool.map(read, range(streams)))
                points.append((streams, 1000 * (time.perf_counter() - begun) / total))
        self.add("streams", "streams at once", "ms for each item", 0.0, points)

    def _connections(self, address: str, most: int) -> None:
        points = []
        for clients in _doubling(4, most):

            def connect(_: int) -> None:
                with Client(address) as client:
                    client.describe_model(NET)

            with ThreadPoolExecutor(clients) as pool:
                begun = time.perf_counter()
                list(pool.map(connect, range(clients)))
                points.append((clients, 1000 * (time.perf_counter() - begun)))
        self.add("connections", "clients connecting at once", "ms until all have an answer", 1.0,
                 points)  # fmt: skip

    def models(self, most: int) -> None:
        """Measure a server with more and more models, with caches as at a second start."""
        memory, times, starts = [], [], []
        with tempfile.TemporaryDirectory() as folder:
            for count in _doubling(4, most):
                flags = ("--item-shape", "3,64,64", "--plan-cache", folder)
                named = [f"m{number}=squeezenet1_1" for number in range(count)]
                with serving(named, *flags):
                    pass  # Its catalogues are kept from now on.
                with serving(named, *flags) as (address, pid, seconds), Client(address) as client:
                    last = f"m{count - 1}"
                    # By HOOK: the layer would be compiled meanwhile.
                    call = partial(client.extract, last, items(1), "features.3", extractor="hook")
                    took = median_ms(call, self._seconds)
                    memory.append((count, proc(pid, "VmRSS")))
                    times.append((count, took))
                    starts.append((count, seconds))
        self.add("models: memory", "models", "MiB resident", 1.0, memory)
        self.add("models: latency", "models", "ms of a request", 0.0, times)
        self.add("models: start", "models", "s to READY with caches", 1.0, starts)

    def sizes(self, nets: Sequence[str]) -> None:
        """Measure first and second starts of models of several sizes."""
        cold, warm, peaks = [], [], []
        with tempfile.TemporaryDirectory() as folder:
            for net in nets:
                flags = ("--layers", LAYERS[net], "--plan-cache", folder)
                size = weights_mib(net)
                with serving([net], *flags) as (address, pid, seconds):
                    first = seconds
                    peaks.append((size, proc(pid, "VmHWM")))
                    with Client(address) as client:
                        (given,) = client.describe_model(net).model.inputs
                with serving([net], *flags) as (_, _, seconds):
                    warm.append((size, seconds))
                shape = [dimension.size for dimension in given.shape]
                cold.append((pass_ms(net, shape), first))
        self.add("first start", "ms of a plain pass", "s to READY without caches", 1.0, cold)
        self.add("restart", "MiB of weights", "s to READY with caches", 1.0, warm)
        self.add("peak memory", "MiB of weights", "MiB at most while loading", 1.0, peaks)


LAYERS = {
    "squeezenet1_1": "features.3,classifier.3",
    "resnet18": "layer1,avgpool",
    "resnet50": "layer1,avgpool",
    "resnet152": "layer1,avgpool",
    "efficientnet_v2_l": "features.2,avgpool",
}
"""The nets whose start is measured, and their declared layers."""


def _doubling(factor: int, most: int) -> list[int]:
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(most, sizes[-1] * factor))
    return sizes


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds for each point")
    parser.add_argument("--callers", type=int, default=256)
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--nets", nargs="*", default=list(LAYERS))
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    curves = Curves(options.seconds)
    with ExitStack() as closing:
        closing.callback(
            lambda: print(json.dumps({n: c["slope"] for n, c in curves.found.items()}))
        )
        curves.requests(options.callers)
        curves.sizes(options.nets)
        curves.models(options.models)
    machine = common.machine("torch", "grpcio")
    common.save("growth", {"machine": machine, "seconds": options.seconds, "curves": curves.found},
                options.results)  # fmt: skip
    report.write(options.results)


if __name__ == "__main__":
    main()
