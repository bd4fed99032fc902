"""``ModelStreamInfer``: many requests over one stream, answered in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc

from layertap.engine import Call, Engine
from layertap.services.infer.ordered_window import OrderedWindow
from layertap.services.stream_threads import StreamThreads

__all__ = ["Answer", "InferStream"]

Answer = Callable[[bytes, Call, grpc.ServicerContext], bytes]
"""Answers one item, failures included; called from many threads."""


class InferStream:
    """Serves the streams.

    Args:
        engine: The engine; its limits say how much a stream may have in flight.
        threads: Serve the streams.
        answer: Answers an item.
    """

    def __init__(self, engine: Engine, threads: StreamThreads, answer: Answer) -> None:
        self._engine = engine
        self._threads = threads
        self._answer = answer

    def serve(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Answer the items of one stream."""
        window = OrderedWindow(self._engine.limits.stream_in_flight)

        def take(message: bytes, remaining: float | None) -> Callable[[], None] | None:
            place = window.admit(remaining)
            if place is None:
                return None
            return lambda: place.answer(self._answer(message, place.call, context))

        yield from self._threads.serve(window, take, messages, context)
