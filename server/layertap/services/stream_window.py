"""The window of a stream whose items have ids, and are answered as they finish."""

from __future__ import annotations

from collections import deque

from layertap.engine import Call
from layertap.errors import CancelledError, InvalidInputError
from layertap.services.item_window import Answer, ItemWindow, again

__all__ = ["StreamWindow"]


class StreamWindow(ItemWindow):
    """The items of one ``ExtractStream``.

    Args:
        places: Items that may be in flight.
    """

    def __init__(self, places: int) -> None:
        super().__init__(places)
        self._calls: dict[int, Call] = {}
        self._answers: deque[tuple[int | None, Answer]] = deque()

    def admit(self, number: int, call: Call) -> None:
        """Let an item take a place.

        Raises:
            InvalidInputError: Where an item with that id is in flight.
            LayertapError: Where no more items are taken.
        """
        with self._changed:
            if self._ended:
                raise again(self._fault or CancelledError("the stream has ended"))
            if number in self._calls:
                raise InvalidInputError(f"id: got {number}, which an item in flight has already")
            self._calls[number] = call
            self._taken += 1

    def refuse(self, reply: bytes) -> None:
        """Let an item that was not admitted take a place, answered already."""
        with self._changed:
            if not self._ended:
                self._taken += 1
                self._put(None, Answer(reply))

    def answer(self, number: int, answer: Answer) -> None:
        """Hand in the reply of an item that was admitted; it is released with the window."""
        with self._changed:
            if not self._closed:
                self._put(number, answer)
                return
        answer.release()

    def _put(self, number: int | None, answer: Answer) -> None:
        self._answers.append((number, answer))
        self._changed.notify_all()

    def _pop(self) -> Answer | None:
        if not self._answers:
            return None
        number, answer = self._answers.popleft()
        if number is not None:
            # Before it is sent: who has the reply may use its id again.
            del self._calls[number]
        return answer

    def _clear(self) -> tuple[list[Call], list[Answer]]:
        calls, answers = list(self._calls.values()), [answer for _, answer in self._answers]
        self._calls.clear()
        self._answers.clear()
        return calls, answers
