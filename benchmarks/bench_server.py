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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np

import common
import report
from layertap import Client, keep_memory
from plan_process import LAYERS, NET, PlanProcess, batch

PHOTO = Path(__file__).resolve().parent.parent / "examples" / "images" / "grace_hopper.jpg"
CONCURRENCY = (1, 2, 4, 8, 16, 32)
BARE_CALLERS = 8
MODES = ("latency", "throughput")
FIRST = 50
BATCHING = {
    "alone": (),
    "max_batch_size 8": ("--max-batch-size", "8"),
    "and a delay of 2 ms": ("--max-batch-size", "8", "--max-queue-delay-us", "2000"),
}


@contextmanager
def serving(mode: str, *flags: str) -> Iterator[str]:
    """Serve the net from a process of its own; yield the address once it is ready."""
    command = [sys.executable, "-m", "layertap", "serve", NET, "--weights", "random"]
    command += ["--layers", ",".join(LAYERS), "--port", "0", "--metrics-port", "-1"]
    command += ["--plan-cache", "off", "--mode", mode, *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            yield next(line for line in process.stderr if "serving" in line).split()[-1]
        finally:
            process.terminate()


def check(ask: Ask, plans: PlanProcess) -> None:
    """Stop where a server's values are not the plan's."""
    for layer in LAYERS:
        expected = plans.values(layer)
        served = ask(layer).ravel()[: len(expected)]
        if not np.allclose(served, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()):
            raise SystemExit(f"{layer}: the server's values are not the plan's")


Ask = Callable[[str], np.ndarray]
"""Asks a server for a layer of the batch."""


@contextmanager
def caller(address: str) -> Iterator[Ask]:
    """Yield what asks our server, on a channel of its own."""
    x = batch()
    with Client(address) as client:
        yield lambda layer: client.extract(NET, x, layer)[layer]


@contextmanager
def bare_caller(address: str) -> Iterator[Ask]:
    """Yield what asks a bare gRPC server, on a channel of its own."""
    x = batch()
    # Without the option all channels of a process to one address share a connection.
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        methods = {layer: channel.unary_unary(f"/bare/{layer}") for layer in LAYERS}
        yield lambda layer: np.frombuffer(methods[layer](x.tobytes()), np.float32)


def latency(rounds: int) -> dict[str, Any]:
    """Time a lone caller: the plan, a bare gRPC server, and ours in latency mode, in turns."""
    x, photo = batch(), PHOTO.read_bytes()
    times: dict[str, list[float]] = {}
    with ExitStack() as closing:
        plans = PlanProcess("latency")
        closing.callback(plans.close)
        address = closing.enter_context(serving("latency"))
        client = closing.enter_context(Client(address))
        check(lambda layer: client.extract(NET, x, layer)[layer], plans)
        bare = closing.enter_context(bare_caller(plans.bare_server()))
        check(bare, plans)
        ways: dict[str, Callable[[], list[float]]] = {}
        for layer in LAYERS:
            ways[f"{layer}, plan in process"] = lambda la=layer: plans.times(la, 10)
            ways[f"{layer}, bare gRPC server"] = lambda la=layer: common.timed(lambda: bare(la), 10)
            ways[f"{layer}, client, tensor"] = lambda la=layer: common.timed(
                lambda: client.extract(NET, x, la), 10
            )
            ways[f"{layer}, client, image"] = lambda la=layer: common.timed(
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
        times = common.timed(lambda: client.extract(NET, batch(), "layer1"), FIRST + 150)
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
            plans = PlanProcess(mode)
            closing.callback(plans.close)
            address = closing.enter_context(serving(mode))
            bare = plans.bare_server()
            for ask in (caller(address), bare_caller(bare)):
                check(closing.enter_context(ask), plans)
            for _ in range(rounds):
                loop = plans.rate("layer1", seconds)
                rates.setdefault("loop in process", []).append(loop)
                for callers in CONCURRENCY:
                    rate = load(partial(caller, address), callers, seconds)["rate"]
                    rates.setdefault(f"{callers} clients", []).append(rate)
                rate = load(partial(bare_caller, bare), BARE_CALLERS, seconds)["rate"]
                rates.setdefault(f"{BARE_CALLERS} of a bare server", []).append(rate)
        results[mode] = {name: statistics.median(values) for name, values in rates.items()}
    return results


def batching(rounds: int, seconds: float) -> dict[str, Any]:
    """Let eight callers ask servers that let requests share passes, and some that don't."""
    rows: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as closing:
        servers = {
            f"{mode}, {title}": closing.enter_context(serving(mode, *flags))
            for mode in MODES
            for title, flags in BATCHING.items()
        }
        for _ in range(rounds):
            for name, address in servers.items():
                rows.setdefault(name, []).append(load(partial(caller, address), 8, seconds))
    return {
        name: {key: statistics.median(row[key] for row in taken) for key in taken[0]}
        for name, taken in rows.items()
    }


def load(
    connect: Callable[[], AbstractContextManager[Ask]], callers: int, seconds: float
) -> dict[str, float]:
    """Return the requests a second that some callers get answered, each on its own channel.

    And the median and 99th percentile of how long they took, in milliseconds.
    """
    begin = threading.Barrier(callers + 1)

    def call() -> list[float]:
        with connect() as ask:
            ask("layer1")
            begin.wait()
            ends, times = time.perf_counter() + seconds, []
            while time.perf_counter() < ends:
                times += common.timed(lambda: ask("layer1"), 1)
        return times

    with ThreadPoolExecutor(callers) as pool:
        taken = [pool.submit(call) for _ in range(callers)]
        begin.wait()
        begun = time.perf_counter()
        times = [each for times in taken for each in times.result()]
    return {"rate": len(times) / (time.perf_counter() - begun), **common.quantiles(times)}


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    keep_memory()  # As the server does by itself, and a client may.
    results = {
        "machine": common.machine("torch", "grpcio"),
        "rounds": options.rounds,
        "latency": latency(options.rounds * 3),
        "first_requests": first_requests(),
        "throughput": throughput(options.rounds, options.seconds),
        "batching": batching(options.rounds, options.seconds),
    }
    common.save("server", results)
    report.write()
    print(json.dumps({k: v for k, v in results.items() if k != "first_requests"}, indent=2))
    print("first", results["first_requests"]["slowest_of_first_to_median"])


if __name__ == "__main__":
    main()
