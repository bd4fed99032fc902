"""What does the server add to a plan, and what is left of the machine when many ask at once?

The plan in a process of its own and the server in another take turns, so that a machine whose speed
drifts slows both alike, and neither computes while the other is timed. Every value is held against
the plan's before anything is timed. The clients share the cores with the server.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import common
import numpy as np
import report

from layertap import Client

NET = "resnet18"
LAYERS = ("layer1", "avgpool")
PHOTO = Path(__file__).resolve().parent.parent / "examples" / "images" / "grace_hopper.jpg"
CONCURRENCY = (1, 2, 4, 8, 16, 32)
MODES = ("latency", "throughput")
FIRST = 50


class InProcess:
    """The same plans without a server: a child process that runs them when it is asked to."""

    def __init__(self, mode: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--child", mode],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, **request: Any) -> Any:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the child."""
        self._process.communicate()


def child(mode: str) -> None:
    """Answer the requests of an InProcess."""
    import torch

    from layertap.engine.compute import ComputeThreads
    from layertap.engine.call import Call
    from layertap.extraction import PlanBuilder, Taps, measure
    from layertap.models import ModelSpec, load_model
    from layertap.selection import Capture, Extractor

    cores = len(common.cores())
    threads = ComputeThreads(64, *((1, None) if mode == "latency" else (cores, 1)))
    model = load_model(ModelSpec(NET, weights="random"))
    x = torch.from_numpy(batch())

    def build() -> dict[str, Any]:
        catalogue = measure(model)
        plans = PlanBuilder(model, Taps(model.module), catalogue)
        shape = tuple(x.shape[1:])
        points = {layer: [catalogue.entry(layer).points[Capture.OUTPUT]] for layer in LAYERS}
        return {la: plans.build(Extractor.TORCHSCRIPT, p, shape).built for la, p in points.items()}

    built = threads.run(build, Call())

    def once(layer: str) -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        built[layer].run(x, lambda index, value: kept.append(value.clone()))
        return kept

    def loop(layer: str, seconds: float) -> int:
        ends, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < ends:
            once(layer)
            count += 1
        return count

    for line in sys.stdin:
        request = json.loads(line)
        layer = request["layer"]
        if "calls" in request:
            answer: Any = threads.run(lambda: timed(lambda: once(layer), request["calls"]), Call())
        elif "seconds" in request:
            with ThreadPoolExecutor(threads.instances) as pool:
                jobs = [
                    pool.submit(threads.run, lambda: loop(layer, request["seconds"]), Call())
                    for _ in range(threads.instances)
                ]
                answer = sum(job.result() for job in jobs) / request["seconds"]
        else:
            answer = threads.run(lambda: once(layer)[0].flatten()[:4096].tolist(), Call())
        print(json.dumps(answer), flush=True)
    threads.close()


def batch() -> np.ndarray:
    """Return the input ``[1, 3, 224, 224]`` of both sides."""
    return np.random.default_rng(0).random((1, 3, 224, 224), dtype=np.float32)


def timed(call: Callable[[], Any], calls: int) -> list[float]:
    """Return the milliseconds of each of some calls."""
    times = []
    for _ in range(calls):
        begun = time.perf_counter()
        call()
        times.append((time.perf_counter() - begun) * 1000)
    return times


@contextmanager
def serving(mode: str, *flags: str) -> Iterator[str]:
    """Serve the net from a process of its own; yield the address once it is ready."""
    command = [sys.executable, "-m", "layertap.cli.main", "serve", NET, "--weights", "random"]
    command += ["--layers", ",".join(LAYERS), "--port", "0", "--metrics-port", "-1"]
    command += ["--plan-cache", "off", "--mode", mode, *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            yield next(line for line in process.stderr if "serving" in line).split()[-1]
        finally:
            process.terminate()


def check(client: Client, plans: InProcess) -> None:
    """Stop where the server's values are not the plan's."""
    for layer in LAYERS:
        served = client.extract(NET, batch(), layer)[layer].ravel()[:4096]
        expected = np.array(plans.ask(layer=layer), np.float32)
        if not np.allclose(served, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()):
            raise SystemExit(f"{layer}: the server's values are not the plan's")


def latency(rounds: int) -> dict[str, Any]:
    """Time a lone caller: the plan, and a client of a server in latency mode, in turns."""
    x, photo = batch(), PHOTO.read_bytes()
    times: dict[str, list[float]] = {}
    with ExitStack() as closing:
        plans = InProcess("latency")
        closing.callback(plans.close)
        address = closing.enter_context(serving("latency"))
        client = closing.enter_context(Client(address))
        check(client, plans)
        ways: dict[str, Callable[[], list[float]]] = {}
        for layer in LAYERS:
            ways[f"{layer}, plan in process"] = lambda la=layer: plans.ask(layer=la, calls=10)
            ways[f"{layer}, client, tensor"] = lambda la=layer: timed(
                lambda: client.extract(NET, x, la), 10
            )
            ways[f"{layer}, client, image"] = lambda la=layer: timed(
                lambda: client.extract(NET, photo, la), 10
            )
        for round_ in range(rounds + 1):
            for name, way in ways.items():
                got = way()[2:]  # The first two wake up whatever slept meanwhile.
                if round_:
                    times.setdefault(name, []).extend(got)
    return {name: common.quantiles(values) for name, values in times.items()}


def first_requests() -> dict[str, Any]:
    """Time the first requests after a server says that it is ready."""
    with serving("latency") as address, Client(address) as client:
        client.wait_ready()
        times = timed(lambda: client.extract(NET, batch(), "layer1"), FIRST + 150)
    median = statistics.median(times[FIRST:])
    return {
        "first": times[:FIRST],
        "later_median": median,
        "slowest_of_first_to_median": max(times[:FIRST]) / median,
    }


def throughput(rounds: int, seconds: float) -> dict[str, Any]:
    """Count what many callers get a second in each mode, beside loops without a server."""
    results: dict[str, Any] = {}
    for mode in MODES:
        rates: dict[str, list[float]] = {}
        with ExitStack() as closing:
            plans = InProcess(mode)
            closing.callback(plans.close)
            address = closing.enter_context(serving(mode))
            check(closing.enter_context(Client(address)), plans)
            for _ in range(rounds):
                loop = plans.ask(layer="layer1", seconds=seconds)
                rates.setdefault("loop in process", []).append(loop)
                for callers in CONCURRENCY:
                    rate = load(address, callers, seconds)
                    rates.setdefault(f"{callers} clients", []).append(rate)
        results[mode] = {name: statistics.median(values) for name, values in rates.items()}
    return results


def load(address: str, callers: int, seconds: float) -> float:
    """Return the requests a second that some callers get answered, each on its own channel."""
    begin = threading.Barrier(callers + 1)
    x = batch()

    def call() -> int:
        with Client(address) as client:
            client.extract(NET, x, "layer1")
            begin.wait()
            ends, count = time.perf_counter() + seconds, 0
            while time.perf_counter() < ends:
                client.extract(NET, x, "layer1")
                count += 1
        return count

    with ThreadPoolExecutor(callers) as pool:
        counts = [pool.submit(call) for _ in range(callers)]
        begin.wait()
        begun = time.perf_counter()
        total = sum(count.result() for count in counts)
    return total / (time.perf_counter() - begun)


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    results = {
        "machine": common.machine("torch", "grpcio"),
        "rounds": options.rounds,
        "latency": latency(options.rounds * 3),
        "first_requests": first_requests(),
        "throughput": throughput(options.rounds, options.seconds),
    }
    common.save("server", results)
    report.write()
    print(json.dumps({k: v for k, v in results.items() if k != "first_requests"}, indent=2))
    print("first", results["first_requests"]["slowest_of_first_to_median"])


if __name__ == "__main__":
    main()
