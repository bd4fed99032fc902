"""Admission: how much the engine takes on at once, in requests and in bytes.

A request that would be too much is refused at once: it can then be sent to another server, while a
queue that only grows would make every caller wait.

Note [Who releases the bytes]
    A request owns its reservations: one for what was received (the message, and what is decoded
    from it), one for its reply. The owner of the request releases them: the first once the answer
    is there, the second once the transport has sent the reply. A job on a compute thread may run on
    after its caller has left, and still needs the memory, so it pins the reservations that it uses:
    bytes go back when they were released and no job pins them.

    Nothing here waits for the garbage collector. The finalizer is a safety net for an owner that
    forgot to release: then the bytes go back when nothing refers to the reservation any more.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from layertap.errors import OverloadedError

__all__ = ["Admission", "Reservation"]


class Admission:
    """Counts requests that wait or run, and the bytes of requests and replies in memory.

    Args:
        max_requests: Requests that may wait or run.
        max_bytes: Bytes of requests and replies that may be in memory.
    """

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._requests = 0
        self._bytes = 0
        self._lock = threading.Lock()
        # What finalizers give back. They may run anywhere, also in a thread that holds the lock.
        self._forgotten: deque[int] = deque()

    @property
    def requests(self) -> int:
        """Requests that wait or run."""
        return self._requests

    @property
    def bytes(self) -> int:
        """Bytes of the requests and replies that are in memory."""
        with self._lock:
            self._collect()
            return self._bytes

    @contextmanager
    def request(self) -> Iterator[None]:
        """Admit one request for as long as the block lasts; raise OverloadedError if it is full."""
        with self._lock:
            if self._requests >= self._max_requests:
                raise OverloadedError(
                    f"queue full: {self._max_requests} requests are waiting, the most allowed"
                )
            self._requests += 1
        try:
            yield
        finally:
            with self._lock:
                self._requests -= 1

    def reserve(self, what: str, nbytes: int = 0) -> Reservation:
        """Return a reservation of that many bytes, which the caller has to release.

        Args:
            what: What the bytes are for, as an error begins: ``"the reply would take"``.
            nbytes: How many to begin with.

        Raises:
            OverloadedError: If they would be over the limit.
        """
        reservation = Reservation(self, what)
        reservation.take(nbytes)
        return reservation

    def _add(self, nbytes: int, what: str) -> None:
        with self._lock:
            self._collect()
            if self._bytes + nbytes > self._max_bytes:
                raise OverloadedError(
                    f"memory: {what} {nbytes} bytes beside {self._bytes} of requests and replies "
                    f"that are in memory; the limit is {self._max_bytes}"
                )
            self._bytes += nbytes

    def _subtract(self, nbytes: int) -> None:
        with self._lock:
            self._bytes -= nbytes

    def _collect(self) -> None:
        while self._forgotten:
            self._bytes -= self._forgotten.popleft()


class Reservation:
    """Bytes of the engine's budget that one request owns; see Note [Who releases the bytes].

    Safe to share between threads. As a context manager it is released at the end of the block.
    Made by ``Admission.reserve``.
    """

    __slots__ = ("_admission", "_lock", "_nbytes", "_pins", "_released", "_what")

    def __init__(self, admission: Admission, what: str) -> None:
        self._admission = admission
        self._what = what
        self._lock = threading.Lock()
        self._nbytes = 0
        self._pins = 0
        self._released = False

    @property
    def nbytes(self) -> int:
        """The bytes that it holds."""
        return self._nbytes

    def take(self, nbytes: int) -> None:
        """Reserve more bytes; raise OverloadedError where they would be over the limit."""
        with self._lock:
            if self._released and not self._pins:
                raise ValueError("the reservation was released")
            self._admission._add(nbytes, self._what)
            self._nbytes += nbytes

    def shrink(self, nbytes: int) -> None:
        """Give back all bytes but that many."""
        with self._lock:
            surplus = max(0, self._nbytes - nbytes)
            self._nbytes -= surplus
        self._admission._subtract(surplus)

    def pin(self) -> None:
        """Keep the bytes, even once they are released, until ``unpin``."""
        with self._lock:
            self._pins += 1

    def unpin(self) -> None:
        """Undo one ``pin``."""
        self._end(pins=-1)

    def release(self) -> None:
        """Give the bytes back, once no job pins them; again and again if one likes."""
        self._end(released=True)

    def __enter__(self) -> Reservation:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release it."""
        self.release()

    def __del__(self) -> None:
        """Give back what the owner has not released."""
        if self._nbytes:
            self._admission._forgotten.append(self._nbytes)

    def _end(self, *, pins: int = 0, released: bool = False) -> None:
        with self._lock:
            self._pins += pins
            self._released |= released
            if self._pins or not self._released:
                return
            nbytes, self._nbytes = self._nbytes, 0
        self._admission._subtract(nbytes)
