"""The items of a stream that are in flight: from being read until their reply was sent."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator

from layertap.engine import Call, Reservation
from layertap.errors import CancelledError, InvalidInputError, LayertapError
from layertap.services.answer import Answer

__all__ = ["ItemWindow", "OrderedWindow", "Place", "UnorderedWindow"]


def _again(error: LayertapError) -> LayertapError:
    """Return a copy of a stored error, to be raised in its place.

    The traceback of a stored error that is raised would refer to the frame that stores it. Only the
    garbage collector could free such a cycle.
    """
    return type(error)(str(error))


class ItemWindow(ABC):
    """The items of one stream. Safe between threads: one reads, many answer, one sends.

    An item takes a place when it is read, and keeps it until gRPC has taken its reply. So the
    server stops reading from a client that doesn't read its replies, which bounds the memory for
    that client. The bytes of a reply are released at the same moment, or when the stream ends.

    Args:
        places: Maximum number of items in flight.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._changed = threading.Condition()
        self._taken = 0
        self._ended = False
        self._closed = False
        self._fault: LayertapError | None = None
        # Only the reservation, as gRPC owns the message by now.
        self._sending: Reservation | None = None

    def wait_for_room(self) -> bool:
        """Wait until another item may be read; return False if the stream takes no more items."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._taken < self._places)
            return not self._ended

    def end(self, fault: LayertapError | None = None) -> None:
        """Accept no more items; after the last reply to those in flight, raise ``fault``."""
        with self._changed:
            if not self._ended:
                self._ended, self._fault = True, fault
                self._changed.notify_all()

    def close(self) -> None:
        """Cancel the items in flight, because no one waits for their replies any more."""
        with self._changed:
            self._ended = self._closed = True
            calls, answers = self._clear()
            sending, self._sending = self._sending, None
            self._changed.notify_all()
        for call in calls:
            call.cancel()
        for answer in answers:
            answer.release()
        if sending is not None:
            sending.release()

    def replies(self) -> Iterator[bytes]:
        """Yield replies until there are no more; resuming a yield means that gRPC has taken it."""
        while (message := self._next()) is not None:
            try:
                yield message
            finally:
                del message  # It may be large, and the next reply may take long.
                self._sent()
        if self._fault is not None and not self._closed:
            raise _again(self._fault)

    @abstractmethod
    def _pop(self) -> Answer | None:
        """Remove and return the next answer that may be sent; None if there is none yet.

        Called with the lock held, like ``_clear``.
        """

    @abstractmethod
    def _clear(self) -> tuple[list[Call], list[Answer]]:
        """Empty the window; return the calls to cancel and the answers that won't be sent."""

    def _next(self) -> bytes | None:
        with self._changed:
            while True:
                answer = None if self._closed else self._pop()
                if answer is not None:
                    self._sending = answer.reservation
                    return answer.message
                if self._closed or (self._ended and not self._taken):
                    return None
                self._changed.wait()

    def _sent(self) -> None:
        with self._changed:
            self._taken -= 1
            sending, self._sending = self._sending, None
            self._changed.notify_all()
        if sending is not None:
            sending.release()


class UnorderedWindow(ItemWindow):
    """The items of one ``ExtractStream``, which have ids and are answered as they finish.

    Args:
        places: Maximum number of items in flight.
    """

    def __init__(self, places: int) -> None:
        super().__init__(places)
        self._calls: dict[int, Call] = {}
        self._answers: deque[tuple[int | None, Answer]] = deque()

    def admit(self, number: int, call: Call) -> None:
        """Take a place for an item.

        Raises:
            InvalidInputError: If another item in flight has this id.
            LayertapError: If the stream accepts no more items.
        """
        with self._changed:
            if self._ended:
                raise _again(self._fault or CancelledError("the stream has ended"))
            if number in self._calls:
                raise InvalidInputError(f"id: got {number}, which another item in flight has")
            self._calls[number] = call
            self._taken += 1

    def refuse(self, reply: bytes) -> None:
        """Take a place for an item that is answered with a refusal already."""
        with self._changed:
            if not self._ended:
                self._taken += 1
                self._put(None, Answer(reply))

    def answer(self, number: int, answer: Answer) -> None:
        """Hand in the reply of an admitted item; if the window is closed, it is released."""
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
            # Before the reply is sent, as a client that has it may use the id again.
            del self._calls[number]
        return answer

    def _clear(self) -> tuple[list[Call], list[Answer]]:
        calls, answers = list(self._calls.values()), [answer for _, answer in self._answers]
        self._calls.clear()
        self._answers.clear()
        return calls, answers


class Place:
    """The place of one item in a window, from when it was read until gRPC has taken its reply.

    Attributes:
        call: The deadline and cancellation state of the item.
    """

    __slots__ = ("_window", "call", "given")

    def __init__(self, window: OrderedWindow, call: Call) -> None:
        self._window = window
        self.call = call
        self.given: Answer | None = None

    def answer(self, answer: Answer) -> None:
        """Hand in the reply. It is sent after the replies of earlier items."""
        self._window.take_answer(self, answer)


class OrderedWindow(ItemWindow):
    """The items of one ``ModelStreamInfer``, which are answered in the order of arrival.

    Triton answers the requests of a stream in order. Its clients rely on that, and so need not give
    their requests ids.

    Args:
        places: Maximum number of items in flight.
    """

    def __init__(self, places: int) -> None:
        super().__init__(places)
        self._items: deque[Place] = deque()

    def admit(self, call: Call) -> Place | None:
        """Take a place for an item; return None if the stream accepts no more."""
        with self._changed:
            if self._ended:
                return None
            self._taken += 1
            self._items.append(Place(self, call))
            return self._items[-1]

    def take_answer(self, place: Place, answer: Answer) -> None:
        """Keep the reply of an item until its turn; if the window is closed, it is released."""
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
