"""The items of one stream: which are in flight, and how each ended. No input and output here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layertap.client.failures import error_from_item
from layertap.client.features import Features
from layertap.errors import InvalidInputError, LayertapError, SharedMemoryLostError
from layertap.v1.feature_service_pb2 import ExtractStreamResponse
from layertap.wire.stream_messages import decode_stream_reply

if TYPE_CHECKING:
    from layertap.client.requests import StreamRequest
    from layertap.shm.client_session import ClientSession

__all__ = ["MAX_IN_FLIGHT", "Outcome", "StreamItems", "check_in_flight"]

MAX_IN_FLIGHT = 16
"""The default number of items in flight, which is also what a server reads ahead by default."""

Outcome = Features | LayertapError


def check_in_flight(max_in_flight: int) -> None:
    """Raise InvalidInputError for a number of items in flight below 1."""
    if max_in_flight < 1:
        raise InvalidInputError(f"max_in_flight: got {max_in_flight}, expected at least 1")


Keys = dict[int, Any]
"""For one iterator: the keys of the items sent and not yet yielded, by the item's number."""


class StreamItems:
    """Numbers and encodes items, and keeps each outcome until its iterator takes it.

    Args:
        max_in_flight: Maximum number of items that one iterator has sent and not yet yielded.
        item_timeout: Seconds for an item without its own timeout; None for no limit.
        memory: The session of shared memory; None for none.

    Attributes:
        unanswered: The number of items that were sent and have no outcome yet.

    Raises:
        InvalidInputError: If ``max_in_flight`` is below 1.
    """

    def __init__(
        self, max_in_flight: int, item_timeout: float | None, memory: ClientSession | None
    ) -> None:
        check_in_flight(max_in_flight)
        self._max_in_flight = max_in_flight
        self._item_timeout = item_timeout
        self._memory = memory
        self._next_number = 0
        self._done: dict[int, Outcome] = {}
        self.unanswered = 0

    def has_room(self, keys: Keys) -> bool:
        """Return whether an iterator may send another item."""
        return len(keys) < self._max_in_flight

    def encode(self, position: int, request: StreamRequest, keys: Keys) -> bytes | None:
        """Number an item and return its message; None if encoding failed, which is its outcome.

        Args:
            position: The position of the item among those of its iterator, from 0.
            request: The item.
            keys: The iterator's keys, to which the item's key is added.
        """
        number, self._next_number = self._next_number, self._next_number + 1
        keys[number] = position if request.key is None else request.key
        try:
            session = self._memory.session if self._memory else b""
            message = request.message(number, self._item_timeout, session)
        except LayertapError as error:
            self._done[number] = error
            return None
        self.unanswered += 1
        return message

    def receive(self, message: bytes) -> None:
        """Keep the outcome in a reply."""
        self.unanswered -= 1
        find = self._memory.finder() if self._memory else None
        try:
            reply, tensors = decode_stream_reply(message, find)
        except SharedMemoryLostError as error:
            self._done[ExtractStreamResponse.FromString(message).id] = error
            return
        if reply.HasField("error"):
            self._done[reply.id] = error_from_item(reply.error)
        else:
            self._done[reply.id] = Features.of_stream(reply, tensors)

    def take(self, keys: Keys, *, ordered: bool) -> tuple[Any, Outcome] | None:
        """Return (key, outcome) of an iterator's next item; None if a reply must be received first.

        Args:
            keys: The iterator's keys, from which the item's key is removed.
            ordered: Whether the next item is the one sent first, or any item with an outcome.
        """
        candidates = [next(iter(keys))] if ordered else list(keys)
        number = next((each for each in candidates if each in self._done), None)
        if number is None:
            return None
        return keys.pop(number), self._done.pop(number)
