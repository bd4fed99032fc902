"""``ExtractStream``: many items over one stream, answered as they finish.

Note [Threads of a stream]
    In synchronous gRPC a stream holds the thread of its RPC, which sends; another one of its own
    reads, as both block. The items of all streams share one pool, whose threads parse, wait for a
    compute thread and encode, as those of unary calls do. Nothing polls. All of them end with the
    RPC: gRPC tells its end by a callback, which cancels what is in flight, and wakes the reader.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import grpc

from layertap.engine import Call, Engine
from layertap.errors import DecodeError, LayertapError
from layertap.services.convert import Converter
from layertap.services.observer import Observer
from layertap.services.open_streams import OpenStreams
from layertap.services.status import code_of, leaving
from layertap.services.stream_window import StreamWindow
from layertap.v1.feature_service_pb2 import ExtractStreamRequest
from layertap.wire.stream_messages import (
    decode_stream_request,
    encode_stream_error,
    id_field,
    id_of,
)
from layertap.wire.tensors import SharedTensor, TensorView

__all__ = ["ExtractStream"]

ITEM_THREADS = 32
"""Items of all streams that are parsed or wait for a compute thread at once."""


class ExtractStream:
    """Serves the streams.

    Args:
        engine: The engine; its limits say how many streams there may be, and how much in flight.
        observer: Is told how each item ended.
        converter: Turns requests into the engine's own form.
        streams: Counts the streams.
    """

    def __init__(
        self, engine: Engine, observer: Observer, converter: Converter, streams: OpenStreams
    ) -> None:
        self._engine = engine
        self._observer = observer
        self._converter = converter
        self._streams = streams
        self._items = ThreadPoolExecutor(ITEM_THREADS, thread_name_prefix="layertap-item")

    def serve(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Answer the items of one stream."""
        with self._streams.opened(StreamWindow(self._engine.limits.stream_in_flight)) as window:
            # False: the stream has ended already, and nobody will tell us any more.
            if not context.add_callback(window.close):
                window.close()
            # In this call's context, and so are the items: what is logged tells the request.
            reader = threading.Thread(
                target=copy_context().run,
                args=(self._read, window, messages, context),
                name="layertap-stream-reader",
            )
            # Not to be waited for at the process's end: gRPC wakes it when the stream ends.
            reader.daemon = True
            reader.start()
            yield from window.replies()

    def close(self) -> None:
        """Let the threads go once the items that they have are done."""
        self._items.shutdown(wait=False)

    def _read(
        self, window: StreamWindow, messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> None:
        try:
            while window.wait_for_room() and (message := next(messages, None)) is not None:
                self._take(message, window, context.time_remaining())
                del message  # It may be large, and the next one may take long.
            window.end()
        except grpc.RpcError:
            window.close()  # The stream was cancelled, or its client went away.
        except Exception as error:  # noqa: BLE001 - it ends the stream, and is logged
            self._observer.failed("", code_of(error))
            window.end(leaving(error))

    def _take(self, message: bytes, window: StreamWindow, remaining: float | None) -> None:
        try:
            request, tensor = decode_stream_request(message)
        except DecodeError as error:
            window.refuse(self._failed(id_of(message), "", error))
            return
        call = Call(_least(request.timeout_ns, remaining))
        try:
            window.admit(request.id, call)
        except LayertapError as error:
            window.refuse(self._failed(request.id, "", error))
            return
        self._items.submit(copy_context().run, self._run, request, tensor, call, window)

    def _run(
        self,
        request: ExtractStreamRequest,
        tensor: TensorView | SharedTensor | None,
        call: Call,
        window: StreamWindow,
    ) -> None:
        window.answer(request.id, self._answer(request, tensor, call))

    def _answer(
        self, request: ExtractStreamRequest, tensor: TensorView | SharedTensor | None, call: Call
    ) -> bytes:
        model = ""
        try:
            call.check()
            wanted = self._converter.convert(request, tensor, id_field(request.id))
            model = self._engine.host(wanted.model).model.name
            extraction = self._engine.extract(wanted, call)
            self._observer.succeeded(model, extraction)
        except Exception as error:  # noqa: BLE001 - it is the reply, and is logged
            return self._failed(request.id, model, error)
        return extraction.message

    def _failed(self, number: int, model: str, error: Exception) -> bytes:
        self._observer.failed(model, code_of(error))
        told = leaving(error)
        return encode_stream_error(number, code_of(told).value[0], type(told).__name__, str(told))


def _least(timeout_ns: int, remaining: float | None) -> float | None:
    """Return the seconds that an item may take; gRPC's remaining time may be None or huge."""
    if not timeout_ns:
        return remaining
    return timeout_ns * 1e-9 if remaining is None else min(timeout_ns * 1e-9, remaining)
