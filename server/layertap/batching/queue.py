"""A queue between threads that add items and threads that run batches of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from layertap.batching.batcher import Batcher
from layertap.settings.batch_policy import ALONE, BatchPolicy

__all__ = ["BatchQueue", "ClosedError"]

T = TypeVar("T")


class ClosedError(Exception):
    """The queue is closed and accepts no more items."""


class BatchQueue(Generic[T]):
    """A ``Batcher`` whose ``take`` blocks until a batch is ready.

    The queue has no limit of its own: only admitted items are added to it.

    Args:
        clock: Returns seconds, and never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._batcher: Batcher[T] = Batcher()
        self._clock = clock
        self._news = threading.Condition(threading.Lock())
        self._closed = False

    def put(
        self,
        item: T,
        key: Hashable = None,
        size: int = 1,
        policy: BatchPolicy = ALONE,
        *,
        length: int = 0,
    ) -> None:
        """Add an item; see ``Batcher.add``. Raises ClosedError after ``close``."""
        with self._news:
            if self._closed:
                raise ClosedError
            self._batcher.add(item, key, size, policy, self._clock(), length=length)
            self._news.notify()

    def discard(self, item: T) -> bool:
        """Remove an item; return whether it was still waiting."""
        with self._news:
            return self._batcher.discard(item)

    def take(self) -> list[T]:
        """Wait for a batch and return its items; an empty list once closed and empty."""
        with self._news:
            while True:
                now = self._clock()
                batch = self._batcher.take(now, at_once=self._closed)
                if batch:
                    if len(self._batcher):
                        # Each new item sends one notification. It may have woken a thread that is
                        # holding a batch back, so each ``take`` passes it on if items remain.
                        self._news.notify()
                    return batch
                if self._closed:
                    return []
                due = self._batcher.due(now)
                self._news.wait(None if due is None else max(0.0, due - now))

    def close(self) -> None:
        """Accept no more items, and hold no more batches back."""
        with self._news:
            self._closed = True
            self._news.notify_all()
