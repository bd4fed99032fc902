"""``ModelStreamInfer``: many requests over one stream, answered in their order.

Its threads are those of ``layertap.services.extract_stream``: see Note [Threads of a stream].
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import grpc

from layertap.engine import Call, Engine
from layertap.services.infer.ordered_window import OrderedWindow, Place
from layertap.services.observer import Observer
from layertap.services.open_streams import OpenStreams
from layertap.services.status import code_of, leaving

__all__ = ["Answer", "InferStream"]

ITEM_THREADS = 32
"""Items of all streams that are parsed or wait for a compute thread at once."""

Answer = Callable[[bytes, Call, grpc.ServicerContext], bytes]
"""Answers one item, failures included; called from many threads."""


class InferStream:
    """Serves the streams.

    Args:
        engine: The engine; its limits say how much a stream may have in flight.
        observer: Is told of streams that could not be read.
        streams: Counts the streams.
        answer: Answers an item.
    """

    def __init__(
        self, engine: Engine, observer: Observer, streams: OpenStreams, answer: Answer
    ) -> None:
        self._engine = engine
        self._observer = observer
        self._streams = streams
        self._answer = answer
        self._items = ThreadPoolExecutor(ITEM_THREADS, thread_name_prefix="layertap-infer")

    def serve(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Answer the items of one stream."""
        with self._streams.opened(OrderedWindow(self._engine.limits.stream_in_flight)) as window:
            # False: the stream has ended already, and nobody will tell us any more.
            if not context.add_callback(window.close):
                window.close()
            reader = threading.Thread(
                target=copy_context().run,
                args=(self._read, window, messages, context),
                name="layertap-stream-reader",
                daemon=True,  # gRPC wakes it when the stream ends.
            )
            reader.start()
            yield from window.replies()

    def close(self) -> None:
        """Let the threads go once the items that they have are done."""
        self._items.shutdown(wait=False)

    def _read(
        self, window: OrderedWindow, messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> None:
        try:
            while window.wait_for_room() and (message := next(messages, None)) is not None:
                if (place := window.admit(context.time_remaining())) is not None:
                    self._items.submit(copy_context().run, self._run, message, place, context)
                del message  # It may be large, and the next one may take long.
            window.end()
        except grpc.RpcError:
            window.close()  # The stream was cancelled, or its client went away.
        except Exception as error:  # noqa: BLE001 - it ends the stream, and is logged
            self._observer.failed("", code_of(error))
            window.end(leaving(error))

    def _run(self, message: bytes, place: Place, context: grpc.ServicerContext) -> None:
        place.answer(self._answer(message, place.call, context))
