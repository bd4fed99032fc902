"""What a stream has in flight: a bounded number of items between being read and being sent."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from layertap.engine import Call
from layertap.errors import CancelledError, InvalidInputError, LayertapError

__all__ = ["StreamWindow"]


class StreamWindow:
    """The items of one stream.

    An item takes a place when it was read, and keeps it until gRPC has taken its reply: so a client
    that does not read its replies is not read from either, and what the server holds for it is
    bounded. Safe between threads: one reads, many answer, one sends.

    Args:
        places: Items that may be in flight.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._changed = threading.Condition()
        self._taken = 0
        self._calls: dict[int, Call] = {}
        self._replies: deque[tuple[int | None, bytes]] = deque()
        self._ended = False
        self._closed = False
        self._fault: LayertapError | None = None

    def wait_for_room(self) -> bool:
        """Wait until another item may be read; return False where none may any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._taken < self._places)
            return not self._ended

    def admit(self, number: int, call: Call) -> None:
        """Let an item take a place.

        Raises:
            InvalidInputError: Where an item with that id is in flight.
            LayertapError: Where no more items are taken.
        """
        with self._changed:
            if self._ended:
                raise self._fault or CancelledError("the stream has ended")
            if number in self._calls:
                raise InvalidInputError(f"id: got {number}, which an item in flight has already")
            self._calls[number] = call
            self._taken += 1

    def refuse(self, reply: bytes) -> None:
        """Let an item that was not admitted take a place, answered already."""
        with self._changed:
            if not self._ended:
                self._taken += 1
                self._put(None, reply)

    def answer(self, number: int, reply: bytes) -> None:
        """Hand in the reply of an item that was admitted."""
        with self._changed:
            if not self._closed:
                self._put(number, reply)

    def end(self, fault: LayertapError | None = None) -> None:
        """Take no more items; once those in flight are answered, ``replies`` raises ``fault``."""
        with self._changed:
            if not self._ended:
                self._ended, self._fault = True, fault
                self._changed.notify_all()

    def close(self) -> None:
        """Say that nobody waits for replies any more: cancel what is in flight."""
        with self._changed:
            self._ended = self._closed = True
            calls = list(self._calls.values())
            self._calls.clear()
            self._replies.clear()
            self._changed.notify_all()
        for call in calls:
            call.cancel()

    def replies(self) -> Iterator[bytes]:
        """Yield replies as they come, until there are no more; a resumed yield means sent."""
        while (reply := self._next_reply()) is not None:
            yield reply
            del reply  # It may be large, and the next one may take long.
            with self._changed:
                self._taken -= 1
                self._changed.notify_all()
        if self._fault is not None and not self._closed:
            raise self._fault

    def _next_reply(self) -> bytes | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._replies or self._closed or (self._ended and not self._taken)
            )
            if not self._replies:
                return None
            number, reply = self._replies.popleft()
            if number is not None:
                # Before it is sent: who has the reply may use its id again.
                del self._calls[number]
            return reply

    def _put(self, number: int | None, reply: bytes) -> None:
        self._replies.append((number, reply))
        self._changed.notify_all()
