"""The programs of declared layers: those in the plan cache, and parts of them.

Note [Programs for fewer layers]
    A program for several layers holds what those for some of them need. So the plans of declared
    layers, each alone, are made of the program for all of them, by leaving out what the others
    need. This saves recording the model again, and in the plan cache a copy of the weights for each
    layer: of resnet50 with ``layer2``, ``layer4`` and ``avgpool``, one file of 94 MB instead of
    files of 287 MB, which a restart would read.

    A part is proven like any other program. If it fails, the layer gets a program of its own, with
    a file, which comes first at the next start.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from layertap.extraction.base import Values
from layertap.extraction.guards import Outcome
from layertap.extraction.kinds.base import CompiledKind
from layertap.extraction.own_words import own_words
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.plan_cache import PlanCache, PlanFile, fingerprint, plan_digest
from layertap.models import Batch, BatchKey, LoadedModel
from layertap.selection import Extractor

__all__ = ["KeptPrograms"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Wider:
    """A proven program for several layers.

    Attributes:
        pass_spec: What it captures.
        program: The program, which is never finished.
        stored: Its file; None if nothing is stored.
        x: A batch.
        values: The reference values for that batch, in the order of the points.
    """

    pass_spec: PassSpec
    program: Any
    stored: PlanFile | None
    x: Batch
    values: Values


class KeptPrograms:
    """Finds the programs of one model that need not be recorded. For a compute thread.

    Args:
        model: The model.
        cache: Stores programs; None if they are not stored.
        known_fingerprint: The model's fingerprint, if it is known already; else empty.
    """

    def __init__(
        self, model: LoadedModel, cache: PlanCache | None, known_fingerprint: str = ""
    ) -> None:
        self._model = model
        self._cache = cache
        self._known_fingerprint = known_fingerprint
        self._wider: dict[tuple[Extractor, BatchKey], _Wider] | None = None

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Make parts of the programs for several layers that are built in the block.

        These programs and their weights stay in memory until the end of the block.
        """
        self._wider = {}
        try:
            yield
        finally:
            self._wider = None

    def file(
        self,
        kind: CompiledKind[Any],
        pass_spec: PassSpec,
        batch_key: BatchKey,
        outcome: Outcome = (),
    ) -> PlanFile | None:
        """Return the file of a program, which may not exist yet; None if nothing is stored."""
        if self._cache is None:
            return None
        digest = plan_digest(self._fingerprint, kind, pass_spec, batch_key, outcome)
        return self._cache.file(digest)

    def load(
        self,
        kind: CompiledKind[Any],
        pass_spec: PassSpec,
        batch_key: BatchKey,
        stored: PlanFile | None,
    ) -> Any:
        """Return the program of a file, or else part of one for more layers; None if there is none.

        Args:
            kind: The program's kind.
            pass_spec: What it must capture.
            batch_key: The key of the batches that it must serve.
            stored: Its file; None if nothing is stored.
        """
        program = stored.load(kind, self._model) if stored else None
        if program is not None:
            return program
        wider = self._wider_for(kind, pass_spec, batch_key)
        if wider is None:
            return None
        points = wider.pass_spec.points
        indexes = [points.index(point) for point in pass_spec.points]
        part = kind.part(wider.program, indexes)
        if part is not None and stored and wider.stored:
            stored.is_part(wider.stored, indexes)
        return part

    def reference(
        self, kind: CompiledKind[Any], pass_spec: PassSpec, x: Batch
    ) -> tuple[Batch, Values] | None:
        """Return a batch of that size and the reference values, if they are known already."""
        wider = self._wider_for(kind, pass_spec, x.key)
        if wider is None or wider.x.size != x.size:
            return None
        points = wider.pass_spec.points
        return wider.x, [wider.values[points.index(point)] for point in pass_spec.points]

    def spare(self, kind: CompiledKind[Any], pass_spec: PassSpec, program: Any) -> Any:
        """Return a copy of an unfinished program to make parts of; None if none will be made."""
        several = len(pass_spec.points) > 1 and not pass_spec.sites and not pass_spec.objective
        if self._wider is None or not several:
            return None
        try:
            return kind.part(program, range(len(pass_spec.points)))
        except Exception as error:  # noqa: BLE001 - then each layer gets a program of its own
            _log.info("model %s: no parts are made: %s", self._model.name, own_words(error))
            return None

    def offer(
        self,
        kind: CompiledKind[Any],
        pass_spec: PassSpec,
        spare: Any,
        stored: PlanFile | None,
        case: tuple[Batch, Values],
    ) -> None:
        """Let parts be made of a program that was just proven.

        Args:
            kind: The program's kind.
            pass_spec: What it captures.
            spare: What ``spare`` returned for it.
            stored: Its file; None if nothing is stored.
            case: A batch, and the reference values for it.
        """
        if self._wider is not None and spare is not None:
            x, values = case
            key = (kind.id, x.key)
            self._wider.setdefault(key, _Wider(pass_spec, spare, stored, x, values))

    def _wider_for(
        self, kind: CompiledKind[Any], pass_spec: PassSpec, batch_key: BatchKey
    ) -> _Wider | None:
        wider = (self._wider or {}).get((kind.id, batch_key))
        if wider is None or pass_spec.sites or pass_spec.objective:
            return None
        return wider if set(pass_spec.points) < set(wider.pass_spec.points) else None

    @cached_property
    def _fingerprint(self) -> str:
        return self._known_fingerprint or fingerprint(self._model)
