"""Admission: limits the requests and bytes that the engine handles at once.

A request over a limit is refused at once. It can then be sent to another server, whereas in a queue
without a limit every caller would wait longer and longer.

Note [Who releases the bytes]
    A request owns two reservations: one for what was received (the message, and what is decoded
    from it) and one for its reply. The owner of the request releases the first once the answer is
    ready, and the second once the transport has sent the reply. A job on a compute thread may
    continue after its caller has left, and still needs the memory. So it pins the reservations that
    it uses: bytes are given back once they are released and no job pins them.

    Nothing here waits for the garbage collector. The finalizer is only a safety net: if an owner
    forgets to release, the bytes are given back once nothing refers to the reservation any more.
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
    """Counts the requests that wait or run, and the bytes of requests and replies in memory.

    Args:
        max_requests: Maximum number of requests that wait or run.
        max_bytes: Maximum bytes of requests and replies in memory.
    """

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._requests = 0
        self._bytes = 0
        self._lock = threading.Lock()
        # Bytes that finalizers give back. These may run anywhere, even while the lock is held.
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
        """Count one request inside the block; raise OverloadedError if the limit is reached."""
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
        """Return a reservation of this many bytes, which the caller must release.

        Args:
            what: What the bytes are for, as the beginning of an error: ``"the reply would take"``.
            nbytes: The bytes to begin with.

        Raises:
            OverloadedError: If they would exceed the limit.
        """
        reservation = Reservation(self, what)
        reservation.take(nbytes)
        return reservation

    def _add(self, nbytes: int, what: str) -> None:
        with self._lock:
            self._collect()
            if self._bytes + nbytes > self._max_bytes:
                raise OverloadedError(
                    f"memory: {what} {nbytes} bytes, and {self._bytes} bytes of requests and "
                    f"replies are already in memory; the limit is {self._max_bytes}"
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

    Safe to share between threads. As a context manager, it is released at the end of the block.
    ``Admission.reserve`` makes it.
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
        """The bytes that are reserved."""
        return self._nbytes

    def take(self, nbytes: int) -> None:
        """Reserve more bytes; raise OverloadedError if they would exceed the limit."""
        with self._lock:
            if self._released and not self._pins:
                raise ValueError("the reservation was released")
            self._admission._add(nbytes, self._what)
            self._nbytes += nbytes

    def shrink(self, nbytes: int) -> None:
        """Keep only this many bytes, and give back the others."""
        with self._lock:
            surplus = max(0, self._nbytes - nbytes)
            self._nbytes -= surplus
        self._admission._subtract(surplus)

    def pin(self) -> None:
        """Keep the bytes until ``unpin``, even if they are released."""
        with self._lock:
            self._pins += 1

    def unpin(self) -> None:
        """Undo one ``pin``."""
        self._end(pins=-1)

    def release(self) -> None:
        """Give the bytes back once no job pins them. Calling this again has no effect."""
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
        """Give back bytes that the owner forgot to release."""
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
