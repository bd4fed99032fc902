"""The open streams of all services: a bounded number, which end when the server drains."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from layertap.errors import UnavailableError
from layertap.services.bounded_calls import BoundedCalls
from layertap.services.item_window import ItemWindow

__all__ = ["OpenStreams"]


W = TypeVar("W", bound=ItemWindow)


class OpenStreams:
    """Counts the open streams. Safe to share between threads.

    Args:
        most: How many streams may be open at once.

    Attributes:
        most: How many streams may be open at once.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._bounded = BoundedCalls(most, "streams are open")
        self._lock = threading.Lock()
        self._windows: set[ItemWindow] = set()
        self._draining = False

    @contextmanager
    def opened(self, window: W) -> Iterator[W]:
        """Count a stream as open inside the block, and close its window afterwards.

        Raises:
            OverloadedError: If too many streams are open.
            UnavailableError: If the server is draining.
        """
        self._check_draining()
        with self._bounded.opened():
            with self._lock:
                self._check_draining()
                self._windows.add(window)
            try:
                yield window
            finally:
                with self._lock:
                    self._windows.discard(window)
                window.close()

    def drain(self) -> None:
        """Accept no more items and streams. Items in flight are still answered."""
        with self._lock:
            self._draining = True
            windows = list(self._windows)
        for window in windows:
            window.end(_shutting_down())

    def _check_draining(self) -> None:
        if self._draining:
            raise _shutting_down()


def _shutting_down() -> UnavailableError:
    return UnavailableError("the server is shutting down")
