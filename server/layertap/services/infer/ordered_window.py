"""The window of a stream whose replies go out in the order of its requests."""

from __future__ import annotations

from collections import deque

from layertap.engine import Call
from layertap.services.item_window import Answer, ItemWindow

__all__ = ["OrderedWindow", "Place"]


class Place:
    """The place of one item, from when it was read until gRPC has taken its reply.

    Attributes:
        call: The deadline and cancellation state of the item.
    """

    __slots__ = ("_window", "call", "given")

    def __init__(self, window: OrderedWindow, timeout: float | None) -> None:
        self._window = window
        self.call = Call(timeout)
        self.given: Answer | None = None

    def answer(self, answer: Answer) -> None:
        """Hand in the reply, which is sent after those of the items before."""
        self._window.take_answer(self, answer)


class OrderedWindow(ItemWindow):
    """The items of one ``ModelStreamInfer``.

    Triton answers the requests of a stream in their order, and its clients rely on that: they need
    not give their requests ids.

    Args:
        places: Items that may be in flight.
    """

    def __init__(self, places: int) -> None:
        super().__init__(places)
        self._items: deque[Place] = deque()

    def admit(self, timeout: float | None = None) -> Place | None:
        """Take a place for an item with a timeout; return None if no more items are taken."""
        with self._changed:
            if self._ended:
                return None
            self._taken += 1
            self._items.append(Place(self, timeout))
            return self._items[-1]

    def take_answer(self, place: Place, answer: Answer) -> None:
        """Keep the reply of an item until it is its turn; it is released with the window."""
        with self._changed:
            if not self._closed:
                place.given = answer
                self._changed.notify_all()
                return
        answer.release()

    def _pop(self) -> Answer | None:
        if not self._items or self._items[0].given is None:
            return None
        return self._items.popleft().given

    def _clear(self) -> tuple[list[Call], list[Answer]]:
        calls = [item.call for item in self._items]
        answers = [item.given for item in self._items if item.given is not None]
        self._items.clear()
        return calls, answers
