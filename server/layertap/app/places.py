"""Places for calls that last as long as their callers like, each of which keeps a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

__all__ = ["Places"]


class Places:
    """A bounded number of them. Safe to share between threads.

    Args:
        most: How many there are.
        what: What is done there, for the error's text.

    Attributes:
        most: As above.
    """

    def __init__(self, most: int, what: str) -> None:
        self.most = most
        self._what = what
        # Reentrant: the garbage collector may end a call anywhere.
        self._lock = threading.RLock()
        self._taken = 0

    @contextmanager
    def taken(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Take a place for as long as the block lasts; end the call where there is none left."""
        with self._lock:
            free = self._taken < self.most
            self._taken += free
        if not free:
            text = f"{self.most} calls {self._what}, the most allowed"
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        try:
            yield
        finally:
            with self._lock:
                self._taken -= 1
