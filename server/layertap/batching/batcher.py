"""Decides which waiting items run next, and which run together. Has no threads and no clock.

Note [When a batch is held back]
    Items with one key may run together. A batch is ready once it is full, or once its oldest item
    has waited for ``max_delay``. It is also ready once it has as many callers as the last batch
    with its key, because then probably no other caller is coming. So a lone caller never waits, and
    eight callers that repeat their requests are served eight at a time. A batch waits in vain only
    when fewer callers come than last time. The last batch is forgotten after MEMORY_SECONDS, so
    the first item after a quiet time doesn't wait either.

    With ``max_delay`` 0, a batch is whatever is already waiting when a thread becomes free.

Note [Items of different lengths]
    Items that have a length are padded to the longest of their batch, so a batch costs its items
    times that length. It holds the oldest item and those whose lengths are nearest to its own, as
    long as the batch stays within the policy's tokens and little of it is padding. The oldest item
    always runs first, so none waits forever.
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

MAX_PADDING = 0.2
"""Largest share of a batch's tokens that may be padding because of another item's length."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting(Generic[T]):
    item: T
    key: Hashable
    size: int
    policy: BatchPolicy
    arrived: float
    length: int = 0


class Batcher(Generic[T]):
    """The waiting items, in the order of arrival.

    Not safe to share between threads; ``layertap.batching.queue`` adds that.
    """

    def __init__(self) -> None:
        self._waiting: list[_Waiting[T]] = []
        # For each key, the number of callers in its last batch and the time when that was taken.
        self._last: OrderedDict[Hashable, tuple[int, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(
        self,
        item: T,
        key: Hashable,
        size: int,
        policy: BatchPolicy,
        now: float,
        *,
        length: int = 0,
    ) -> None:
        """Add an item to the waiting items.

        Args:
            item: Anything; items are distinguished by identity.
            key: Items with equal keys may run together; an item with None runs alone.
            size: How much it adds to a batch, at least 1.
            policy: The policy for its key.
            now: Seconds on a clock that never goes back.
            length: The length to which it is padded already, if items of other lengths have its
                key too; 0 if the key determines the length.
        """
        self._waiting.append(_Waiting(item, key, size, policy, now, length))

    def discard(self, item: T) -> bool:
        """Remove an item that is no longer needed; return whether it was still waiting."""
        for index, waiting in enumerate(self._waiting):
            if waiting.item is item:
                del self._waiting[index]
                return True
        return False

    def take(self, now: float, *, at_once: bool = False) -> list[T]:
        """Remove and return the oldest batch that is ready; an empty list if none is.

        Args:
            now: Seconds on the clock of ``add``.
            at_once: Whether every batch counts as ready.
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
        """Yield (batch, whether it is full) for the waiting items, the oldest batch first."""
        seen: set[Hashable] = set()
        for index, first in enumerate(self._waiting):
            if first.key is None:
                yield [first], True
            elif first.key not in seen:
                seen.add(first.key)
                yield self._together(index)

    def _together(self, index: int) -> tuple[list[_Waiting[T]], bool]:
        first = self._waiting[index]
        if first.length:
            return self._alike(index)
        batch, size = [first], first.size
        for other in self._waiting[index + 1 :]:
            if other.key != first.key:
                continue
            if size + other.size > first.policy.max_size:
                # Later items must not overtake this one, or it might wait forever.
                return batch, True
            batch.append(other)
            size += other.size
        return batch, size >= first.policy.max_size

    def _alike(self, index: int) -> tuple[list[_Waiting[T]], bool]:
        """Return the batch of an item of some length; see Note [Items of different lengths]."""
        first = self._waiting[index]
        others = [each for each in self._waiting[index + 1 :] if each.key == first.key]
        # Stable, so the older one of two that are equally near comes first.
        others.sort(key=lambda other: abs(other.length - first.length))
        batch, full = [first], first.size >= first.policy.max_size
        for other in others:
            if _fits([*batch, other], first.policy):
                batch.append(other)
            else:
                full = True
        return batch, full

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


def _fits(batch: list[_Waiting[T]], policy: BatchPolicy) -> bool:
    size = sum(each.size for each in batch)
    tokens = size * max(each.length for each in batch)
    own = sum(each.size * each.length for each in batch)
    within = size <= policy.max_size and tokens <= policy.max_tokens
    return within and tokens - own <= MAX_PADDING * tokens
