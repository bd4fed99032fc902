"""Admission: how much the engine takes on at once, in requests and in bytes.

Refusing at once is kinder than a queue that only grows: whoever is admitted is served soon, and
whoever is not can ask another server.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from layertap.engine.call import Call
from layertap.errors import OverloadedError

__all__ = ["Admission"]


class Admission:
    """Counts requests that wait or run, and the bytes of replies that are not sent yet.

    Args:
        max_requests: Requests that may wait or run.
        max_bytes: Bytes of replies that may be in memory.
    """

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._requests = 0
        self._bytes = 0
        # Reentrant: the garbage collector may end a call, and so give its bytes back, anywhere.
        self._lock = threading.RLock()

    @property
    def requests(self) -> int:
        """Requests that wait or run."""
        return self._requests

    @property
    def reply_bytes(self) -> int:
        """Bytes of the replies that are being made or sent."""
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

    def reserve(self, nbytes: int, call: Call) -> None:
        """Take bytes of the budget until the call ends, which is after its reply was sent.

        A ``Call`` ends when nothing refers to it any more: gRPC does until the RPC is over, however
        slowly its client reads.

        Raises:
            OverloadedError: Where they would be over the budget.
        """
        with self._lock:
            if self._bytes + nbytes > self._max_bytes:
                raise OverloadedError(
                    f"memory: the reply would take {nbytes} bytes beside {self._bytes} of replies "
                    f"that are being made or sent; the limit is {self._max_bytes}"
                )
            self._bytes += nbytes
        weakref.finalize(call, self._release, nbytes).atexit = False

    def _release(self, nbytes: int) -> None:
        with self._lock:
            self._bytes -= nbytes
