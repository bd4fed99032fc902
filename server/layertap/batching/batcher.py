"""Decides which waiting items run next, and together. No threads or clock: time is an argument.

Note [When a batch is held back]
    Items with one key may run together. A batch goes as soon as it is full, or its oldest item has
    waited for ``max_delay``. It also goes as soon as as many callers are in it as were in the last
    one of its key: then nobody is left to wait for. So a lone caller never waits, while eight that
    ask again and again are served eight at a time, and only where fewer come than last time does
    one batch wait in vain. What the last batch was like is forgotten after MEMORY_SECONDS, so the
    first item after a quiet while goes at once as well.

    With ``max_delay`` 0 a batch is whatever is waiting already when a thread becomes free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from layertap.settings.batch_policy import BatchPolicy

__all__ = ["Batcher"]

T = TypeVar("T")

MEMORY_SECONDS = 1.0
MAX_REMEMBERED = 256


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting(Generic[T]):
    item: T
    key: Hashable
    size: int
    policy: BatchPolicy
    arrived: float


class Batcher(Generic[T]):
    """Items that wait, in the order in which they came.

    Not safe to share between threads; ``layertap.batching.queue`` makes it so.
    """

    def __init__(self) -> None:
        self._waiting: list[_Waiting[T]] = []
        # How many callers the last batch of a key had, and when it went.
        self._last: OrderedDict[Hashable, tuple[int, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, item: T, key: Hashable, size: int, policy: BatchPolicy, now: float) -> None:
        """Let an item wait.

        Args:
            item: Anything; told from others by identity.
            key: Items with equal keys may run together; None runs alone.
            size: What it adds to a batch, from 1.
            policy: That of its key.
            now: Seconds on a clock that never goes back.
        """
        self._waiting.append(_Waiting(item, key, size, policy, now))

    def discard(self, item: T) -> bool:
        """Let an item go that nobody wants any more; determine whether it was still waiting."""
        for index, waiting in enumerate(self._waiting):
            if waiting.item is item:
                del self._waiting[index]
                return True
        return False

    def take(self, now: float, *, at_once: bool = False) -> list[T]:
        """Take the oldest batch that is ready out of the queue; an empty list where none is.

        Args:
            now: Seconds on the clock of ``add``.
            at_once: Whether to hold nothing back.
        """
        for batch, full in self._batches():
            if full or at_once or self._due(batch, now) <= now:
                self._remove(batch, now)
                return [waiting.item for waiting in batch]
        return []

    def due(self, now: float) -> float | None:
        """Return when the next batch will be ready if nothing arrives; None if nothing waits."""
        return min((self._due(batch, now) for batch, _ in self._batches()), default=None)

    def _batches(self) -> Iterator[tuple[list[_Waiting[T]], bool]]:
        """Yield the batches that the waiting items make, the oldest first, and which are full."""
        seen: set[Hashable] = set()
        for index, first in enumerate(self._waiting):
            if first.key is None:
                yield [first], True
            elif first.key not in seen:
                seen.add(first.key)
                yield self._together(index)

    def _together(self, index: int) -> tuple[list[_Waiting[T]], bool]:
        first = self._waiting[index]
        batch, size = [first], first.size
        for other in self._waiting[index + 1 :]:
            if other.key != first.key:
                continue
            if size + other.size > first.policy.max_size:
                # Anyone who came later doesn't overtake it, or it might wait for ever.
                return batch, True
            batch.append(other)
            size += other.size
        return batch, size >= first.policy.max_size

    def _due(self, batch: list[_Waiting[T]], now: float) -> float:
        first = batch[0]
        callers, when = self._last.get(first.key, (1, now))
        if len(batch) >= callers or now - when > MEMORY_SECONDS:
            return first.arrived
        return first.arrived + first.policy.max_delay

    def _remove(self, batch: list[_Waiting[T]], now: float) -> None:
        gone = set(map(id, batch))
        self._waiting = [waiting for waiting in self._waiting if id(waiting) not in gone]
        first = batch[0]
        if first.key is None or not first.policy.max_delay:
            return
        self._last[first.key] = len(batch), now
        self._last.move_to_end(first.key)
        if len(self._last) > MAX_REMEMBERED:
            self._last.popitem(last=False)
