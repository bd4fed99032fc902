"""Many items over one stream: a bounded number in flight, outcomes as they finish."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
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
        max_in_flight: Items that are sent and not yet yielded.
        timeout: Seconds that the stream may take; None for no limit.
        item_timeout: Seconds for an item that does not say so itself; None for no limit.
        memory: The session of shared memory; None for none.
        metadata: What the call carries besides the caller's trace.

    Raises:
        InvalidInputError: For a ``max_in_flight`` below 1.

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
    ) -> None:
        self._items = StreamItems(max_in_flight, item_timeout, memory)
        self._memory = memory
        if memory is not None:
            memory.begin_call()
        self._closed = False
        self._process = os.getpid()
        # gRPC sends from its own thread, which waits here; None is the half close. It holds
        # as much as is in flight, at most.
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self._call = method(
            iter(self._outgoing.get, None),
            timeout=bounded(timeout),
            metadata=(*metadata, *(trace_metadata() or ())),
        )

    def extract(
        self, requests: Iterable[StreamRequest], *, ordered: bool = False
    ) -> Iterator[tuple[Any, Outcome]]:
        """Yield each item's key and its outcome: its features, or the error that it ended with.

        ``requests`` is read in the caller's thread, and no further than ``max_in_flight`` ahead of
        what was yielded. Several iterators may take turns. An iterator that is left before its end
        closes the stream.

        Args:
            requests: The items.
            ordered: Whether to yield in their order, or as they finish.

        Raises:
            UnavailableError: If the stream is closed, or another process opened it.
            LayertapError: What the stream itself ended with; the items that were not yielded have
                no answer.
        """
        if self._closed:
            raise UnavailableError("the stream is closed")
        self._check_process()
        numbered = enumerate(requests)
        keys: dict[int, Any] = {}
        finished = False
        try:
            while self._fill(numbered, keys):
                while (taken := self._items.take(keys, ordered=ordered)) is None:
                    self._receive()
                yield taken
            finished = True
        finally:
            if not finished:
                self.close()

    def close(self) -> None:
        """End the stream: what is in flight is abandoned. Features that came stay valid."""
        if self._closed:
            return
        self._closed = True
        if self._process != os.getpid():
            return  # A forked child's copy: the stream is the parent's.
        self._outgoing.put(None)
        ended = threading.Event()
        # With nothing in flight the server ends it at once with OK, which is what its operators
        # want to read; where it doesn't, nobody waits for long.
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
        """Send items while there is room; return whether any is left to be yielded."""
        while self._items.has_room(keys):
            position, request = next(requests, (0, None))
            if request is None:
                break
            message = self._items.encode(position, request, keys)
            if message is not None:
                self._outgoing.put(message)
        return bool(keys)

    def _receive(self) -> None:
        """Receive an outcome; one that belongs to another iterator is kept for it."""
        self._check_process()
        try:
            self._items.receive(next(self._call))
        except StopIteration:
            raise UnavailableError("the server ended the stream") from None
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
