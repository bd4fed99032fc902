"""``ExtractStream``: many items over one stream, answered as they finish."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from layertap.engine import Engine, Reservation
from layertap.errors import DecodeError, InvalidInputError, LayertapError
from layertap.services.answer import Answer
from layertap.services.caller import Caller
from layertap.services.convert import Converter, DecodedItem
from layertap.services.data_plane import DataPlane
from layertap.services.error_codes import code_of
from layertap.services.item_window import UnorderedWindow
from layertap.services.observer import Observer
from layertap.services.public_errors import public_error
from layertap.services.stream_threads import StreamThreads
from layertap.wire.stream_messages import (
    decode_stream_request,
    encode_stream_error,
    id_of,
)

__all__ = ["ExtractStream"]


class ExtractStream:
    """Serves the streams.

    Args:
        engine: The engine, whose limits bound the items that a stream may have in flight.
        observer: Notified how each item ended.
        converter: Converts requests to the engine's own form.
        threads: Serves the streams.
    """

    def __init__(
        self, engine: Engine, observer: Observer, converter: Converter, threads: StreamThreads
    ) -> None:
        self._plane = DataPlane(engine, observer)
        self._places = engine.limits.stream_in_flight
        self._observer = observer
        self._converter = converter
        self._threads = threads

    def serve(self, messages: Iterator[bytes], caller: Caller) -> Iterator[bytes]:
        """Answer the items of one stream."""
        window = UnorderedWindow(self._places)
        take = partial(self._take, window, caller)
        yield from self._threads.serve(window, take, messages, caller)

    def _take(
        self, window: UnorderedWindow, stream: Caller, message: bytes
    ) -> Callable[[], None] | None:
        try:
            decoded = decode_stream_request(message)
        except DecodeError as error:
            window.refuse(self._failed(id_of(message), error, stream.of_item()))
            return None
        request, _ = decoded
        caller = stream.of_item(request.timeout_ns * 1e-9 if request.timeout_ns else None)
        try:
            window.admit(request.id, caller.call)
        except LayertapError as error:
            window.refuse(self._failed(request.id, error, caller))
            return None
        try:
            received = self._plane.receive(len(message), caller)
        except LayertapError as error:
            window.answer(request.id, _failure(request.id, error))
            return None
        return partial(self._run, decoded, caller, received, window)

    def _run(
        self,
        decoded: DecodedItem,
        caller: Caller,
        received: Reservation,
        window: UnorderedWindow,
    ) -> None:
        number = decoded[0].id
        convert = partial(self._converter.convert_item, decoded, received)
        try:
            extraction = self._plane.run(received, caller, convert)
        except Exception as error:  # noqa: BLE001 - it is the reply, and is logged
            window.answer(number, _failure(number, error))
        else:
            window.answer(number, Answer(extraction.payload, extraction.reservation))

    def _failed(self, number: int, error: Exception, caller: Caller) -> bytes:
        self._observer.failed("", code_of(error), caller)
        return _failure(number, error).message


def _failure(number: int, error: Exception) -> Answer:
    told = public_error(error)
    code = code_of(told).value
    image = told.image if isinstance(told, InvalidInputError) else None
    return Answer(encode_stream_error(number, code, type(told).__name__, str(told), image))
