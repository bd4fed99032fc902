"""One served model: its taps, its catalogue and its plans."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

from layertap.engine.call import Call
from layertap.engine.compute import ComputeThread
from layertap.engine.limits import Limits
from layertap.engine.resolve import Resolved, resolve
from layertap.errors import ExtractorUnsupportedError, InvalidInputError
from layertap.extraction.catalogue import Catalogue
from layertap.extraction.measure import measure
from layertap.extraction.plan import Plan, PlanBuilder
from layertap.extraction.points import CapturePoint
from layertap.extraction.taps import Taps
from layertap.models import LoadedModel
from layertap.selection import Extractor, LayerSelection

__all__ = ["ModelHost"]

PlanKey = tuple[Extractor, tuple[CapturePoint, ...], tuple[int, ...]]
Refusal = InvalidInputError | ExtractorUnsupportedError
V = TypeVar("V")

MAX_REFUSALS = 256
MAX_RESOLVED = 256


class ModelHost:
    """A loaded model and everything that was learnt about it.

    Args:
        model: The model.
        compute: The thread that runs it; measuring runs there, so construction takes a while.
        limits: What requests may ask for.

    Raises:
        ModelLoadError: Where the model can't run on its own input shape.
    """

    def __init__(self, model: LoadedModel, compute: ComputeThread, limits: Limits) -> None:
        self.model = model
        self.declared: list[LayerSelection] = []
        self._compute = compute
        self._taps = Taps(model.module)
        self.catalogue: Catalogue = compute.run(lambda: measure(model), Call())
        self._builder = PlanBuilder(model, self._taps, self.catalogue)
        self._lock = threading.Lock()
        self._plans: OrderedDict[PlanKey, Plan] = OrderedDict()
        self._declared_plans: dict[PlanKey, Plan] = {}
        self._refusals: OrderedDict[PlanKey, Refusal] = OrderedDict()
        self._max_plans = limits.plans
        self.resolve = lru_cache(maxsize=MAX_RESOLVED)(
            lambda selections, extractor: resolve(
                self.catalogue, selections, extractor, limits.layers
            )
        )

    def declare(self, selections: Sequence[LayerSelection]) -> None:
        """Build and keep the compiled plans of layers that will be asked for.

        Together and each alone, at the model's own item shape: AUTO serves them by TORCHSCRIPT.

        Raises:
            LayertapError: Whatever a request for them would raise.
        """
        self.declared = list(selections)
        sets = [tuple(selections), *((selection,) for selection in selections)]
        for chosen in dict.fromkeys(sets):
            points = self.resolve(chosen, Extractor.TORCHSCRIPT).points
            key = (Extractor.TORCHSCRIPT, points, self.model.input.item_shape)
            if key not in self._declared_plans:
                self._declared_plans[key] = self._compute.run(
                    lambda key=key: self._builder.build(*key), Call()
                )

    def plan(self, resolved: Resolved, item_shape: tuple[int, ...], call: Call) -> Plan:
        """Return the plan that serves a request, built on the compute thread where it is new."""
        key = (self._choose(resolved, item_shape), resolved.points, item_shape)
        return self._known(key) or self._compute.run(lambda: self._build(key), call)

    def close(self) -> None:
        """Take the hooks off the model and forget its plans."""
        self._taps.close()
        with self._lock:
            self._plans.clear()
            self._declared_plans.clear()

    def _choose(self, resolved: Resolved, item_shape: tuple[int, ...]) -> Extractor:
        if len(resolved.candidates) == 1:
            return resolved.candidates[0]
        compiled = (Extractor.TORCHSCRIPT, resolved.points, item_shape)
        if compiled in self._declared_plans:
            return Extractor.TORCHSCRIPT
        return Extractor.HOOK if Extractor.HOOK in resolved.candidates else resolved.candidates[0]

    def _known(self, key: PlanKey) -> Plan | None:
        with self._lock:
            plan = self._declared_plans.get(key) or _touch(self._plans, key)
            refusal = None if plan else _touch(self._refusals, key)
        if refusal is not None:
            raise type(refusal)(str(refusal))
        return plan

    def _build(self, key: PlanKey) -> Plan:
        known = self._known(key)  # Another request may have built it while this one was queued.
        if known is not None:
            return known
        try:
            plan = self._builder.build(*key)
        except (InvalidInputError, ExtractorUnsupportedError) as refusal:
            self._remember(self._refusals, key, refusal, MAX_REFUSALS)
            raise
        self._remember(self._plans, key, plan, self._max_plans)
        return plan

    def _remember(self, cache: OrderedDict[PlanKey, V], key: PlanKey, value: V, most: int) -> None:
        with self._lock:
            cache[key] = value
            while len(cache) > most:
                cache.popitem(last=False)


def _touch(cache: OrderedDict[PlanKey, V], key: PlanKey) -> V | None:
    if key in cache:
        cache.move_to_end(key)
    return cache.get(key)
