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
    """Counts calls that last as long as their callers like, each of which keeps a thread.

    Safe to share between threads.

    Args:
        most: How many may be open at once.
        what: What they do, for the error's text, such as ``"calls watch health"``.

    Attributes:
        most: As above.
        open: How many are open now.
    """

    def __init__(self, most: int, what: str) -> None:
        self.most = most
        self.open = 0
        self._what = what
        # Reentrant: the garbage collector may end a call anywhere.
        self._lock = threading.RLock()

    @contextmanager
    def opened(self, refuse: Callable[[str], object] = _overloaded) -> Iterator[None]:
        """Count a call for as long as the block lasts.

        Args:
            refuse: Called with the reason if as many as allowed are open already; has to raise.

        Raises:
            OverloadedError: In that case, unless ``refuse`` raises something else.
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
