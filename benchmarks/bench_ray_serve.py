"""What does Ray's gRPC proxy cost, against calls to the replica's own gRPC port?

One replica of ``layertap.ray.serve:app`` with a resnet18 and random weights serves both, so the
engine is the same and only the way differs. The ways take turns. Every value is held against the
model in this process before anything is timed. The client, the proxy and the replica share the
machine's cores, and so do Ray's own processes.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

import common
import report
from layertap import Client
from ray_cluster import cluster

NET = "resnet18"
CASES = {"2 KB": (1, "avgpool"), "800 KB": (1, "layer1"), "12.8 MB": (16, "layer1")}
"""The size of the reply: the items of the request, and the layer."""
SMALL = "2 KB"
CALLERS = 8
DIRECT, PROXY, MEMORY = "direct", "Ray's proxy", "direct, shared memory"


def free_port() -> int:
    """Return a port at which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def batch(items: int) -> np.ndarray:
    """Return a batch, the same each time."""
    return np.random.default_rng(0).random((items, 3, 224, 224), np.float32)


@contextmanager
def clients(cores: int) -> Iterator[dict[str, Client]]:
    """Serve the net; yield a client for each way."""
    from ray import serve

    from layertap.ray.serve import app

    direct, proxy = free_port(), free_port()
    functions = ["layertap.ray.serve.add_to_server"]
    args = {
        "models": [{"source": NET, "weights": "random", "layers": ["avgpool", "layer1"]}],
        "server": {
            "host": "127.0.0.1",
            "port": direct,
            "metrics_port": -1,
            "plan_cache": "off",
            "threads": cores,
        },
        "direct": True,
        "deployment": {"num_replicas": 1, "ray_actor_options": {"num_cpus": cores}},
    }
    with ExitStack() as closing:
        closing.enter_context(cluster(cores + 2))
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": "127.0.0.1", "port": free_port()},
            grpc_options={"port": proxy, "grpc_servicer_functions": functions},
        )
        closing.callback(serve.shutdown)
        serve.run(app(args))
        yield {
            name: closing.enter_context(Client(f"127.0.0.1:{port}", shared_memory=shared))
            for name, port, shared in (
                (DIRECT, direct, False),
                (PROXY, proxy, False),
                (MEMORY, direct, True),
            )
        }


def check(ways: dict[str, Client], cores: int) -> None:
    """Stop where a way's values are not the model's."""
    import layertap

    with layertap.load(NET, weights="random", device="cpu", threads=cores) as model:
        for items, layer in CASES.values():
            x = batch(items)
            expected = model.extract(x, layer, extractor="hook").numpy()[layer]
            for name, client in ways.items():
                found = client.extract(NET, x, layer, extractor="hook")[layer]
                if not np.allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()):
                    raise SystemExit(f"{name}, {layer}: the values are not the model's")


def latency(ways: dict[str, Client], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Time a lone caller's calls, by size of the reply and way."""
    found = {}
    for case, (items, layer) in CASES.items():
        x = batch(items)
        calls = {
            name: lambda client=client: client.extract(NET, x, layer)  # noqa: B023 - called here
            for name, client in ways.items()
        }
        for call in calls.values():
            common.timed(call, 20)
        found[case] = common.in_turns(calls, rounds, slow=())
    return found


def rate(client: Client, seconds: float) -> float:
    """Return the calls per second that several callers get answered."""
    items, layer = CASES[SMALL]
    x = batch(items)
    begin = threading.Barrier(CALLERS + 1)

    def call() -> int:
        begin.wait()
        ends, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < ends:
            client.extract(NET, x, layer)
            count += 1
        return count

    with ThreadPoolExecutor(CALLERS) as pool:
        counts = [pool.submit(call) for _ in range(CALLERS)]
        begin.wait()
        begun = time.perf_counter()
        total = sum(each.result() for each in counts)
    return total / (time.perf_counter() - begun)


def stream_rate(client: Client, seconds: float) -> float:
    """Return the items per second of one stream."""
    items, layer = CASES[SMALL]
    x = batch(items)
    ends, count, begun = time.perf_counter() + seconds, 0, time.perf_counter()

    def inputs() -> Iterator[np.ndarray]:
        while time.perf_counter() < ends:
            yield x

    for _ in client.extract_many(NET, inputs(), layer):
        count += 1
    return count / (time.perf_counter() - begun)


def rates(ways: dict[str, Client], rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Return the median rates of each way."""
    taken: dict[str, dict[str, list[float]]] = {"calls": {}, "items of a stream": {}}
    for _ in range(rounds):
        for name, client in ways.items():
            taken["calls"].setdefault(name, []).append(rate(client, seconds))
            taken["items of a stream"].setdefault(name, []).append(stream_rate(client, seconds))
    return {
        what: {name: statistics.median(values) for name, values in by_way.items()}
        for what, by_way in taken.items()
    }


def main() -> None:
    """Measure, keep the results, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each rate of a round")
    parser.add_argument("--dry", action="store_true", help="run everything once, keep nothing")
    options = parser.parse_args()
    rounds = 1 if options.dry else options.rounds
    seconds = 0.5 if options.dry else options.seconds
    cores = len(common.cores())
    with clients(cores) as ways:
        check(ways, cores)
        results: dict[str, Any] = {
            "machine": common.machine("ray", "grpcio", "torch"),
            "rounds": rounds,
            "callers": CALLERS,
            "latency": latency(ways, rounds),
            "rates": rates(ways, min(rounds, 5), seconds),
        }
    for case, by_way in results["latency"].items():
        times = ", ".join(f"{name} {took['p50']:.2f} ms" for name, took in by_way.items())
        print(f"{case}: {times}")
    for what, by_name in results["rates"].items():
        print(f"{what}: " + ", ".join(f"{name} {each:.1f}/s" for name, each in by_name.items()))
    if not options.dry:
        common.save("ray_serve", results)
        report.write()


if __name__ == "__main__":
    main()
