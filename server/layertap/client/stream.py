"""Many items over one stream: a limited number in flight, outcomes as they finish."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc

from layertap.client.failures import error_from_rpc
from layertap.client.items import MAX_IN_FLIGHT, Outcome, StreamItems
from layertap.client.timeouts import bounded
from layertap.client.trace_context import trace_metadata
from layertap.errors import UnavailableError

if TYPE_CHECKING:
    from layertap.client.requests import StreamRequest
    from layertap.shm.client_session import ClientSession

__all__ = ["FeatureStream"]


class FeatureStream:
    """One open ``ExtractStream``. For one thread at a time; ``Client.stream`` makes them.

    Args:
        method: The channel's ``ExtractStream``.
        max_in_flight: Maximum number of items that are sent and not yet yielded.
        timeout: Seconds that the stream may take; None for no limit.
        item_timeout: Seconds for an item without its own timeout; None for no limit.
        memory: The session of shared memory; None for none.
        metadata: The metadata of the call, besides the caller's trace.
        on_close: Called once, when the stream is closed.

    Raises:
        InvalidInputError: If ``max_in_flight`` is below 1.

    Example:
        >>> asks = [StreamRequest("resnet18", path, "avgpool", key=path) for path in paths]
        >>> with client.stream() as stream:
        ...     for path, outcome in stream.extract(asks):
        ...         print(path, outcome)
    """

    def __init__(
        self,
        method: grpc.StreamStreamMultiCallable,
        max_in_flight: int = MAX_IN_FLIGHT,
        timeout: float | None = None,
        item_timeout: float | None = None,
        memory: ClientSession | None = None,
        *,
        metadata: tuple[tuple[str, str], ...] = (),
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._items = StreamItems(max_in_flight, item_timeout, memory)
        self._memory = memory
        if memory is not None:
            memory.begin_call()
        self._on_close = on_close
        self._closed = False
        self._process = os.getpid()
        # gRPC's own thread takes messages from here and sends them; None means the half close. The
        # queue never holds more than the items in flight.
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self._call = method(
            iter(self._outgoing.get, None),
            timeout=bounded(timeout),
            metadata=(*metadata, *(trace_metadata() or ())),
        )

    def extract(
        self, requests: Iterable[StreamRequest], *, ordered: bool = False
    ) -> Iterator[tuple[Any, Outcome]]:
        """Yield each item's key and outcome: its features, or its error.

        ``requests`` is read in the caller's thread, at most ``max_in_flight`` items ahead of what
        was yielded. Several iterators may be used in turn. Leaving an iterator before its end
        closes the stream.

        Args:
            requests: The items.
            ordered: Whether to yield in the order of the items, or as they finish.

        Raises:
            UnavailableError: If the stream is closed, or another process opened it.
            LayertapError: If the stream itself fails; the remaining items then have no outcome.
        """
        if self._closed:
            raise UnavailableError("the stream is closed")
        self._check_process()
        numbered = enumerate(requests)
        keys: dict[int, Any] = {}
        finished = False
        try:
            while self._fill(numbered, keys):
                # No variable: it would keep the reply, and its shared memory, until the next one.
                yield self._next(keys, ordered=ordered)
            finished = True
        finally:
            if not finished:
                self.close()

    def close(self) -> None:
        """End the stream and abandon the items in flight. Received features stay valid."""
        if self._closed:
            return
        self._closed = True
        if self._process != os.getpid():
            return  # A forked child's copy: the stream is the parent's.
        self._on_close()
        self._outgoing.put(None)
        ended = threading.Event()
        # With nothing in flight, the server ends the stream at once with OK, which looks better in
        # its logs than a cancellation. If it doesn't, we don't wait long.
        if not self._items.unanswered and self._call.add_callback(ended.set):
            ended.wait(1.0)
        self._call.cancel()
        if self._memory is not None:
            self._memory.end_call()

    def __enter__(self) -> Self:
        """Return the stream."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the stream."""
        self.close()

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise UnavailableError(
                "the stream belongs to the parent process of this fork; open a new one here"
            )

    def _fill(self, requests: Iterator[tuple[int, StreamRequest]], keys: dict[int, Any]) -> bool:
        """Send items while there is room; return whether any items are left to yield."""
        while self._items.has_room(keys):
            position, request = next(requests, (0, None))
            if request is None:
                break
            message = self._items.encode(position, request, keys)
            if message is not None:
                self._outgoing.put(message)
        return bool(keys)

    def _next(self, keys: dict[int, Any], *, ordered: bool) -> tuple[Any, Outcome]:
        while (taken := self._items.take(keys, ordered=ordered)) is None:
            self._receive()
        return taken

    def _receive(self) -> None:
        """Receive an outcome, and keep it until the iterator that it belongs to takes it."""
        self._check_process()
        try:
            self._items.receive(next(self._call))
        except StopIteration:
            raise UnavailableError("the server ended the stream") from None
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
