"""The plans that a server would run, without a server: in a process of its own, run on request.

Started as a program it answers requests, a JSON object a line; ``PlanProcess`` starts it. It also
runs them behind the least that a Python gRPC server can be, which is the floor of any.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Any

import grpc
import numpy as np

import common
from layertap import keep_memory

__all__ = ["LAYERS", "NET", "PlanProcess", "batch"]

NET = "resnet18"
LAYERS = ("layer1", "avgpool")
SHOWN = 4096


def batch() -> np.ndarray:
    """Return the input ``[1, 3, 224, 224]`` of both sides."""
    return np.random.default_rng(0).random((1, 3, 224, 224), dtype=np.float32)


class PlanProcess:
    """A child process with the compiled plans of LAYERS.

    Args:
        mode: ``latency`` or ``throughput``, with the same threads as a server's.
    """

    def __init__(self, mode: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, mode],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def values(self, layer: str) -> np.ndarray:
        """Return the first SHOWN numbers of a layer."""
        return np.array(self._ask(do="values", layer=layer), np.float32)

    def times(self, layer: str, calls: int) -> list[float]:
        """Return the milliseconds of each of some calls."""
        return list(self._ask(do="times", layer=layer, calls=calls))

    def rate(self, layer: str, seconds: float) -> float:
        """Return the runs a second of loops on every instance."""
        return float(self._ask(do="rate", layer=layer, seconds=seconds))

    def bare_server(self) -> str:
        """Serve the plans at the address that is returned, until the child ends.

        The method is named after the layer, ``/bare/LAYER``; the request is the input's bytes, the
        reply the layer's. Nothing is parsed, checked, named or counted.
        """
        return str(self._ask(do="bare_server"))

    def close(self) -> None:
        """End the child."""
        self._process.communicate()

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


class _Plans:
    """The child's side: plans on compute threads like a server's."""

    def __init__(self, mode: str) -> None:
        # Here, so that the parent measures as a client does, without PyTorch.
        import torch

        from layertap.engine import Call
        from layertap.engine.compute import ComputeThreads
        from layertap.models import Batch, ModelSpec, load_model

        keep_memory()
        instances, cores = (1, None) if mode == "latency" else (len(common.cores()), 1)
        self._threads = ComputeThreads(instances, cores)
        self._call = Call
        self._model = load_model(ModelSpec(NET, weights="random"))
        self._x = Batch({self._model.signature.main.name: torch.from_numpy(batch())})
        self._built = self._run(self._build)
        self._server: grpc.Server | None = None

    def _run(self, job: Any) -> Any:
        return self._threads.run(job, self._call())

    def _build(self) -> dict[str, Any]:
        from layertap.extraction import PlanBuilder, Taps, measure
        from layertap.extraction.pass_spec import PassSpec
        from layertap.selection import Capture, Extractor

        catalogue = measure(self._model)
        plans = PlanBuilder(self._model, Taps(self._model.module), catalogue)
        built = {}
        for layer in LAYERS:
            pass_spec = PassSpec((catalogue.entry(layer).points[Capture.OUTPUT],))
            built[layer] = plans.build(Extractor.TORCHSCRIPT, pass_spec, self._x.key).built
        return built

    def _once(self, layer: str, x: Any = None) -> list[Any]:
        kept: list[Any] = []
        x = self._x if x is None else x
        self._built[layer].run(x, lambda index, value: kept.append(value.clone()))
        return kept

    def values(self, layer: str) -> list[float]:
        return self._run(partial(self._once, layer))[0].flatten()[:SHOWN].tolist()

    def times(self, layer: str, calls: int) -> list[float]:
        return self._run(lambda: common.timed(partial(self._once, layer), calls))

    def rate(self, layer: str, seconds: float) -> float:
        def loop() -> int:
            ends, count = perf_counter() + seconds, 0
            while perf_counter() < ends:
                self._once(layer)
                count += 1
            return count

        with ThreadPoolExecutor(self._threads.instances) as pool:
            loops = [pool.submit(self._run, loop) for _ in range(self._threads.instances)]
            return sum(done.result() for done in loops) / seconds

    def bare_server(self) -> str:
        import torch

        from layertap.models import Batch

        shape = tuple(self._x.only.shape)

        def answer(layer: str, message: bytes) -> bytes:
            x = torch.from_numpy(np.frombuffer(message, np.float32).reshape(shape))
            return (
                self._run(partial(self._once, layer, Batch(dict.fromkeys(self._x, x))))[0]
                .numpy()
                .tobytes()
            )

        handlers = {
            layer: grpc.unary_unary_rpc_method_handler(lambda m, _, la=layer: answer(la, m))
            for layer in LAYERS
        }
        self._server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("bare", handlers),)
        )
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        return f"127.0.0.1:{port}"

    def close(self) -> None:
        if self._server is not None:
            self._server.stop(0).wait()
        self._threads.close()


def _answer(mode: str) -> None:
    plans = _Plans(mode)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(plans, request.pop("do"))(**request)), flush=True)
    plans.close()


if __name__ == "__main__":
    _answer(sys.argv[1])
