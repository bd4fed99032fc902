"""Requests that wait at the same time, so that they may share a pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from asking import Given, request_for
from layertap import Extractor, Features
from layertap.engine import Call, Engine, Extraction
from layertap.engine.compute import ComputeThreads

__all__ = ["Together", "asking", "threads"]


def threads(engine: Engine) -> ComputeThreads:
    """Return the threads that run the engine's models."""
    return engine.hosts()[0].compute


class Together:
    """Extractions that all wait while the compute thread is blocked, and then run."""

    def __init__(self, engine: Engine, asked: Sequence[Callable[[], Extraction]]) -> None:
        begun, go = threading.Event(), threading.Event()

        def hold() -> None:
            begun.set()
            assert go.wait(60)

        with ThreadPoolExecutor(len(asked) + 1) as pool:
            held = pool.submit(threads(engine).run, hold, Call())
            assert begun.wait(60)
            self.done: list[Future[Extraction]] = []
            for index, ask in enumerate(asked):
                self.done.append(pool.submit(ask))
                while len(threads(engine)._queue._batcher) < index + 1:
                    threading.Event().wait(0.002)
            go.set()
            held.result(60)

    def values(self) -> list[dict[str, torch.Tensor]]:
        """Return the result of each extraction."""
        return [Features(done.result().payload).torch() for done in self.done]

    @property
    def shared(self) -> list[int]:
        """How many requests shared the pass of each."""
        return [done.result().together for done in self.done]


def asking(
    engine: Engine,
    net: str,
    layers: str | Sequence[str],
    batches: Sequence[Given],
    extractor: Extractor = Extractor.HOOK,
) -> list[Callable[[], Extraction]]:
    """Return an extraction of each batch.

    It names an extractor because AUTO may change to a compiled plan between two of the requests,
    and requests with different plans don't share a pass.
    """
    for x in batches:  # So that every plan is there already.
        engine.extract(request_for(net, layers, x, extractor), Call())
    return [
        lambda x=x: engine.extract(request_for(net, layers, x, extractor), Call()) for x in batches
    ]
