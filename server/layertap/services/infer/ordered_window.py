"""What a stream has in flight whose replies go out in the order of its requests."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from layertap.engine import Call
from layertap.errors import LayertapError

__all__ = ["OrderedWindow", "Place"]


class Place:
    """The place of one item, from when it was read until gRPC has taken its reply.

    Attributes:
        call: The item's patience.
    """

    __slots__ = ("_window", "call", "reply")

    def __init__(self, window: OrderedWindow, timeout: float | None) -> None:
        self._window = window
        self.call = Call(timeout)
        self.reply: bytes | None = None

    def answer(self, reply: bytes) -> None:
        """Hand in the reply, which is sent after those of the items before."""
        self._window.take_reply(self, reply)


class OrderedWindow:
    """The items of one stream; a bounded number. Safe between threads, as StreamWindow.

    Triton answers the requests of a stream in their order, and its clients rely on that: they need
    not give their requests ids.

    Args:
        places: Items that may be in flight.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._changed = threading.Condition()
        self._items: deque[Place] = deque()
        self._sending = 0
        self._ended = False
        self._closed = False
        self._fault: LayertapError | None = None

    def wait_for_room(self) -> bool:
        """Wait until another item may be read; return False where none may any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended or len(self._items) + self._sending < self._places
            )
            return not self._ended

    def admit(self, timeout: float | None = None) -> Place | None:
        """Let an item take a place, for so many seconds; None where no more items are taken."""
        with self._changed:
            if self._ended:
                return None
            self._items.append(Place(self, timeout))
            return self._items[-1]

    def take_reply(self, place: Place, reply: bytes) -> None:
        """Keep the reply of an item until it is its turn."""
        with self._changed:
            if not self._closed:
                place.reply = reply
                self._changed.notify_all()

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
            items = list(self._items)
            self._items.clear()
            self._changed.notify_all()
        for item in items:
            item.call.cancel()

    def replies(self) -> Iterator[bytes]:
        """Yield the replies in order, until there are no more; a resumed yield means sent."""
        while (reply := self._next_reply()) is not None:
            yield reply
            del reply  # It may be large, and the next one may take long.
            with self._changed:
                self._sending = 0
                self._changed.notify_all()
        if self._fault is not None and not self._closed:
            raise self._fault

    def _next_reply(self) -> bytes | None:
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._closed
                    or (self._items and self._items[0].reply is not None)
                    or (self._ended and not self._items)
                )
            )
            if not self._items:
                return None
            self._sending = 1
            return self._items.popleft().reply
