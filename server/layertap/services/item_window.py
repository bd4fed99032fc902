"""The items that a stream has in flight: a bounded number, from being read to being sent."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from layertap.engine import Call, Reservation
from layertap.errors import LayertapError

__all__ = ["Answer", "ItemWindow", "again"]


@dataclass(frozen=True, slots=True)
class Answer:
    """The reply to one item of a stream.

    Attributes:
        message: The serialized reply.
        reservation: Its bytes of the engine's budget; None for a reply that counts for nothing.
    """

    message: bytes
    reservation: Reservation | None = None

    def release(self) -> None:
        """Give the bytes back."""
        if self.reservation is not None:
            self.reservation.release()


def again(error: LayertapError) -> LayertapError:
    """Return an error to raise in place of one that is kept.

    A kept error that is raised refers, by its traceback, to the frame that keeps it: a circle that
    only the garbage collector would find.
    """
    return type(error)(str(error))


class ItemWindow(ABC):
    """The items of one stream. Safe between threads: one reads, many answer, one sends.

    An item takes a place when it is read and keeps it until gRPC has taken its reply. So the server
    stops reading from a client that does not read its replies, and what it holds for that client is
    bounded. The bytes of a reply are released at the same moment, or when the stream ends.

    Args:
        places: Items that may be in flight.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._changed = threading.Condition()
        self._taken = 0
        self._ended = False
        self._closed = False
        self._fault: LayertapError | None = None
        # The reservation only: the message itself belongs to gRPC by now.
        self._sending: Reservation | None = None

    def wait_for_room(self) -> bool:
        """Wait until another item may be read; return False if the stream takes no more items."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._taken < self._places)
            return not self._ended

    def end(self, fault: LayertapError | None = None) -> None:
        """Take no more items; once those in flight are answered, ``replies`` raises ``fault``."""
        with self._changed:
            if not self._ended:
                self._ended, self._fault = True, fault
                self._changed.notify_all()

    def close(self) -> None:
        """Cancel the items in flight, as nobody waits for replies any more."""
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
        """Yield replies until there are no more; a resumed yield means that gRPC has sent it."""
        while (message := self._next()) is not None:
            try:
                yield message
            finally:
                del message  # It may be large, and the next one may take long.
                self._sent()
        if self._fault is not None and not self._closed:
            raise again(self._fault)

    @abstractmethod
    def _pop(self) -> Answer | None:
        """Take the next answer that may be sent out of the window; None where there is none yet.

        Called with the lock held, as ``_clear`` is.
        """

    @abstractmethod
    def _clear(self) -> tuple[list[Call], list[Answer]]:
        """Empty the window; return the calls to cancel and the answers that are not sent."""

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
