"""Hands out batches in order, within a budget of memory, and keeps count of what is under way."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Task", "Tasks"]

_OPEN_SHARDS = 2
"""Shards that may be under way: one is written while the other is filled. So a crash repeats at
most one shard that was computed already."""


@dataclass(frozen=True, slots=True)
class Task:
    """One batch.

    Attributes:
        shard: The number of its shard.
        items: The indices of its items.
        nbytes: The memory that its rows take.
    """

    shard: int
    items: Sequence[int]
    nbytes: int


class Tasks:
    """The batches of a run. Safe to share between threads.

    Args:
        tasks: The batches, those of one shard after those of another.
        memory: Bytes that rows and inputs may take; one shard and one batch are always allowed.

    Attributes:
        changed: Is notified whenever something ends.
        error: The error that ended the run; None if none did.
    """

    def __init__(self, tasks: Iterator[Task], memory: int) -> None:
        self.changed = threading.Condition()
        self.error: BaseException | None = None
        self._tasks = tasks
        self._next = next(tasks, None)
        self._memory = memory
        self._used = 0
        self._returned: deque[Task] = deque()
        self._running = 0
        self._open: set[int] = set()
        self._stopped = False

    def take(self) -> Task | None:
        """Wait for a batch that may be run now; None if there will be no more."""
        with self.changed:
            while not self._stopped:
                task = self._ready()
                if task is not None:
                    self._running += 1
                    return task
                if self._next is None and not self._running:
                    return None
                self.changed.wait()
        return None

    def give_back(self, task: Task) -> None:
        """Return a batch that could not be run, for another worker."""
        with self.changed:
            self._returned.append(task)
            self._running -= 1
            self.changed.notify_all()

    def done(self, task: Task) -> None:
        """Note that the rows of a batch are in their shard."""
        with self.changed:
            self._running -= 1
            self._used -= task.nbytes  # The reply is freed; the copy in the shard stays.
            self.changed.notify_all()

    def committed(self, shard: int, nbytes: int) -> None:
        """Note that a shard is on the disk, and its memory free."""
        with self.changed:
            self._open.discard(shard)
            self._used -= nbytes
            self.changed.notify_all()

    def stop(self, error: BaseException | None = None) -> None:
        """Hand out no more batches. The first error is kept."""
        with self.changed:
            self._stopped = True
            self.error = self.error or error
            self.changed.notify_all()

    @property
    def stopped(self) -> bool:
        """Whether the run was stopped."""
        return self._stopped

    def _ready(self) -> Task | None:
        if self._returned:
            return self._returned.popleft()
        task = self._next
        if task is None:
            return None
        new = task.shard not in self._open
        if new and len(self._open) >= _OPEN_SHARDS:
            return None
        # Twice: in the reply, and in the shard.
        needed = 2 * task.nbytes
        alone = self._running == 0 and (not new or not self._open)
        if self._used + needed > self._memory and not alone:
            return None
        self._open.add(task.shard)
        self._used += needed
        self._next = next(self._tasks, None)
        return task
