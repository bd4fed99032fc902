"""Limits how many calls of one kind may be open at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from layertap.errors import OverloadedError

__all__ = ["BoundedCalls"]


def _overloaded(text: str) -> NoReturn:
    raise OverloadedError(text)


class BoundedCalls:
    """Limits the calls that last as long as their callers like and each occupy a thread.

    Safe to share between threads.

    Args:
        most: How many such calls may be open at once.
        what: What the calls do, for the error message, such as ``"calls watch health"``.

    Attributes:
        most: How many such calls may be open at once.
        open: How many are open now.
    """

    def __init__(self, most: int, what: str) -> None:
        self.most = most
        self.open = 0
        self._what = what
        # Reentrant, because the garbage collector may end a call at any point.
        self._lock = threading.RLock()

    @contextmanager
    def opened(self, refuse: Callable[[str], object] = _overloaded) -> Iterator[None]:
        """Count a call as open inside the block.

        Args:
            refuse: Called with the reason if the limit is reached; it must raise.

        Raises:
            OverloadedError: If the limit is reached, unless ``refuse`` raises something else.
        """
        with self._lock:
            free = self.open < self.most
            self.open += free
        if not free:
            refuse(f"{self.most} {self._what}, the most allowed")
        try:
            yield
        finally:
            with self._lock:
                self.open -= 1
