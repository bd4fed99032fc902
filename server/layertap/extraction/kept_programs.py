"""The programs of declared layers: those in the plan cache, and parts of them.

Note [Programs for fewer layers]
    A program for several layers holds what those for some of them need. So the plans of declared
    layers, each alone, are made of the program for all of them, by leaving out what the others
    need. This saves recording the model again, and in the plan cache a copy of the weights for each
    layer: of resnet50 with ``layer2``, ``layer4`` and ``avgpool``, one file of 94 MB instead of
    files of 287 MB, which a restart would read.

    A part is proven like any other program, but the model need not run again: the proof for all of
    the layers had the same batches. If the proof fails, the layer gets a program of its own, with
    a file, which comes first at the next start.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from layertap.extraction.base import BuiltExtractor, Values
from layertap.extraction.guards import Outcome
from layertap.extraction.kinds.base import CompiledKind
from layertap.extraction.own_words import own_words
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.plan_cache import PlanCache, PlanFile, fingerprint, plan_digest
from layertap.models import Batch, BatchKey, LoadedModel
from layertap.selection import Extractor

__all__ = ["KeptPrograms", "Part"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Wider:
    """A proven program for several layers.

    Attributes:
        pass_spec: What it captures.
        built: The program, finished.
        portable: Whether it may be tried at other sizes of the inputs.
        stored: Its file; None if nothing is stored.
        cases: The batches of its proof, each with the reference values in the order of the points.
    """

    pass_spec: PassSpec
    built: BuiltExtractor
    portable: bool
    stored: PlanFile | None
    cases: Sequence[tuple[Batch, Values]]


class Part(NamedTuple):
    """Part of a program for more layers.

    Attributes:
        built: The part.
        portable: Whether it may be tried at other sizes of the inputs.
    """

    built: BuiltExtractor
    portable: bool


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
        """Make parts of the programs for several layers that are built in the block."""
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

    def part(
        self,
        kind: CompiledKind[Any],
        pass_spec: PassSpec,
        batch_key: BatchKey,
        stored: PlanFile | None,
    ) -> Part | None:
        """Return part of a program for more layers; None if there is none.

        Args:
            kind: The program's kind.
            pass_spec: What it must capture.
            batch_key: The key of the batches that it must serve.
            stored: The file that the program would have; None if nothing is stored.
        """
        wider = self._wider_for(kind, pass_spec, batch_key)
        if wider is None:
            return None
        points = wider.pass_spec.points
        indexes = [points.index(point) for point in pass_spec.points]
        try:
            part = kind.part(wider.built, indexes)
        except Exception as error:  # noqa: BLE001 - then the layer gets a program of its own
            _log.info("model %s: no part is made: %s", self._model.name, own_words(error))
            return None
        if part is None:
            return None
        if stored and wider.stored:
            stored.is_part(wider.stored, indexes)
        return Part(part, wider.portable)

    def reference(self, kind: CompiledKind[Any], pass_spec: PassSpec, x: Batch) -> Values | None:
        """Return the reference values for a batch if the proof for more layers had that batch."""
        wider = self._wider_for(kind, pass_spec, x.key)
        if wider is None:
            return None
        points = wider.pass_spec.points
        for batch, values in wider.cases:
            if batch.equals(x):
                return [values[points.index(point)] for point in pass_spec.points]
        return None

    def offer(
        self,
        kind: CompiledKind[Any],
        pass_spec: PassSpec,
        built: BuiltExtractor,
        stored: PlanFile | None,
        cases: Sequence[tuple[Batch, Values]],
        *,
        portable: bool,
    ) -> None:
        """Let parts be made of a program that was just proven.

        Args:
            kind: The program's kind.
            pass_spec: What it captures.
            built: The program, finished.
            stored: Its file; None if nothing is stored.
            cases: The batches of its proof, all with one key, and the reference values for each.
            portable: Whether it may be tried at other sizes of the inputs.
        """
        several = len(pass_spec.points) > 1 and not pass_spec.sites and not pass_spec.objective
        if self._wider is not None and several:
            key = (kind.id, cases[0][0].key)
            self._wider.setdefault(key, _Wider(pass_spec, built, portable, stored, cases))

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
