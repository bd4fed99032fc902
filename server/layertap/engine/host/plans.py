"""The plans of one model, and what was refused."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import TypeVar

from layertap.errors import ExtractorUnsupportedError, InvalidInputError
from layertap.extraction.kinds.registry import kind_of
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.plan import Plan, PlanKey
from layertap.models import BatchKey

__all__ = ["Plans", "Refusal"]

Refusal = InvalidInputError | ExtractorUnsupportedError
V = TypeVar("V")

MAX_PREDICTED = 1024
"""Plans that run the model itself and whose shapes the catalogue predicts; they take no memory."""

MAX_REFUSALS = 256


class Plans:
    """The plans of one model, and what was refused. Thread-safe.

    Plans of declared layers stay. Of the others, the least recently used are dropped if there are
    too many, or if their compiled programs are.

    Args:
        most: Maximum number of plans, besides those of declared layers.
        most_programs: Maximum number of compiled programs of these plans.
    """

    def __init__(self, most: int, most_programs: int) -> None:
        self._most = most
        self._most_programs = most_programs
        self._lock = threading.Lock()
        self._declared: dict[PlanKey, Plan] = {}
        self._built: OrderedDict[PlanKey, Plan] = OrderedDict()
        self._predicted: OrderedDict[PlanKey, Plan] = OrderedDict()
        self._refusals: OrderedDict[PlanKey, Refusal] = OrderedDict()

    def find(self, key: PlanKey) -> Plan | None:
        """Return a plan without counting that as a use; None if there is none."""
        with self._lock:
            return self._declared.get(key) or self._built.get(key) or self._predicted.get(key)

    def use(self, key: PlanKey) -> Plan | None:
        """Return a plan, which counts as used now; None if there is none.

        Raises:
            InvalidInputError, ExtractorUnsupportedError: If it was refused.
        """
        with self._lock:
            plan = self._declared.get(key) or _touch(self._built, key)
            plan = plan or _touch(self._predicted, key)
            refusal = None if plan else _touch(self._refusals, key)
        if refusal is not None:
            raise type(refusal)(str(refusal))
        return plan

    def use_built(self, key: PlanKey) -> tuple[Plan | None, bool]:
        """Return a plan that was built, which counts as used now, and whether it was refused."""
        with self._lock:
            return self._declared.get(key) or _touch(self._built, key), key in self._refusals

    def is_refused(self, key: PlanKey) -> bool:
        """Return whether a plan was refused."""
        with self._lock:
            return key in self._refusals

    def refusals(self) -> list[tuple[PlanKey, Refusal]]:
        """Return what was refused and why, the least recently used first."""
        with self._lock:
            return list(self._refusals.items())

    def built(self) -> dict[PlanKey, Plan]:
        """Return all plans that were built, those of declared layers first."""
        with self._lock:
            return {**self._declared, **self._built}

    def compiled(self, pass_spec: PassSpec, batch_key: BatchKey) -> list[PlanKey]:
        """Return the keys of all compiled plans for a pass, of whatever outcome."""
        return [
            key
            for key in self.built()
            if key.batch_key == batch_key
            and key.pass_spec == pass_spec
            and kind_of(key.extractor).compiled
        ]

    def has_room(self) -> bool:
        """Return whether another compiled program can be kept without dropping one."""
        with self._lock:
            return len(_programs(self._built.values())) < self._most_programs

    def declare(self, plan: Plan) -> None:
        """Keep a plan of declared layers."""
        with self._lock:
            self._declared[plan.key] = plan

    def add(self, key: PlanKey, plan: Plan) -> None:
        """Keep a plan, and drop the least recently used ones if there are too many."""
        with self._lock:
            _remember(self._built, key, plan, self._most)
            for each in list(self._superfluous()):
                del self._built[each]

    def add_predicted(self, key: PlanKey, plan: Plan) -> None:
        """Keep a plan whose shapes are predicted."""
        with self._lock:
            _remember(self._predicted, key, plan, MAX_PREDICTED)

    def refuse(self, key: PlanKey, refusal: Refusal) -> None:
        """Record a copy of a refusal, because the original's traceback keeps the batches alive."""
        with self._lock:
            _remember(self._refusals, key, type(refusal)(str(refusal)), MAX_REFUSALS)

    def drop(self, key: PlanKey) -> None:
        """Drop a plan that was built, even of declared layers."""
        with self._lock:
            for plans in (self._declared, self._built):
                plans.pop(key, None)

    def drop_predicted(self, key: PlanKey) -> None:
        """Drop a plan whose shapes are predicted."""
        with self._lock:
            self._predicted.pop(key, None)

    def clear(self) -> None:
        """Drop all plans."""
        with self._lock:
            for plans in (self._declared, self._built, self._predicted):
                plans.clear()

    def _superfluous(self) -> Iterator[PlanKey]:
        """Yield the plans with the programs that are too many; the lock is held."""
        programs: set[int] = set()
        for key, plan in reversed(self._built.items()):
            its = _programs([plan])
            if len(programs | its) > self._most_programs:
                yield key
            else:
                programs |= its


def _programs(plans: Iterable[Plan]) -> set[int]:
    """Return the ids of the compiled programs of plans; several sizes may have one together."""
    return {id(plan.built) for plan in plans if plan.kind.compiled}


def _touch(cache: OrderedDict[PlanKey, V], key: PlanKey) -> V | None:
    if key in cache:
        cache.move_to_end(key)
    return cache.get(key)


def _remember(cache: OrderedDict[PlanKey, V], key: PlanKey, value: V, most: int) -> None:
    cache[key] = value
    while len(cache) > most:
        cache.popitem(last=False)
