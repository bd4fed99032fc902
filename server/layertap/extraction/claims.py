"""Tests the catalogue's claims before the first request.

Note [Tried before the first request]
    Measuring a model finds its layers, and reasons why some extractors can't serve some of them.
    Whether the extractors really can serve the others is tested here, so that a client that names
    an extractor gets what the catalogue promised. The model runs on a few batches of several sizes
    and ranges of values. Its symbolic graph and its compiled programs run on the same batches. If
    one fails or differs, the catalogue refuses the layers that it concerns, with the reason. If the
    batches make the model's code go several ways, programs are compiled for some of these ways.

    Some faults show on none of these batches: a branch on batch sizes above three, say, or code
    that treats items of another shape differently. Then the proof of the first such request's plan
    finds the fault, and that request is refused. A kind that compiles slowly is tested then only.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from layertap.extraction.catalogue import Catalogue, LayerEntry
from layertap.extraction.compile_trial import (
    Case,
    CompileTrial,
    Faults,
    depends_on_size,
    run_case,
    sometimes,
)
from layertap.extraction.digest import sample_step
from layertap.extraction.guards import is_fraction
from layertap.extraction.kinds.base import BuildContext, CompiledKind
from layertap.extraction.kinds.registry import KINDS
from layertap.extraction.obstacles import UNREPEATED
from layertap.extraction.out_of_memory import is_out_of_memory
from layertap.extraction.own_words import own_words
from layertap.extraction.passes import PassScope
from layertap.extraction.points import CapturePoint, PointKind
from layertap.extraction.samples import (
    bytes_batch,
    ordinary_batch,
    reaching_batches,
    wide_batch,
)
from layertap.extraction.survey import LooksSurvey, survey_looks
from layertap.extraction.symbolic import Trace
from layertap.extraction.taps import Taps
from layertap.models import Batch, LoadedModel
from layertap.selection import Capture, Extractor

__all__ = ["kept_claims"]

_log = logging.getLogger(__name__)

MAX_OTHER_WAYS = 3
"""Maximum number of further ways of a model's code for which programs are compiled."""

_OTHER_WAY = "for input that takes another branch, "
_DEAD = "it depends on statements that dead-code elimination removes"


@dataclass(frozen=True)
class _Found:
    """What the trial found about one extractor.

    Attributes:
        faults: Why it can't serve a point, for the points of modules that it can't serve.
        nodes: Why it can't serve the nodes of the symbolic graph; empty if it can.
    """

    faults: Faults
    nodes: str = ""


def kept_claims(
    model: LoadedModel, catalogue: Catalogue, trace: Trace | None = None
) -> Iterator[Catalogue | None]:
    """Test the catalogue's claims in steps; yield the catalogue of those that are true at the end.

    See Note [Tried before the first request]. Call this from a compute thread. Each step takes
    about as long as a pass of a few items, except that compiling is one long step.

    Args:
        model: The measured model.
        catalogue: The catalogue that measuring it gave.
        trace: Its symbolic graph; None if it has none, or none that claims to serve layers.

    Yields:
        None for each step, then the catalogue without the claims that failed.
    """
    try:
        found = yield from _Trial(model, catalogue).run(trace)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _log.warning(
            "model %s: not enough memory to test what its extractors can serve (%s); this is "
            "tested at the first request instead", model.name, own_words(error),
        )  # fmt: skip
        found = {}
    entries = {name: _kept(entry, found) for name, entry in catalogue.entries.items()}
    yield replace(catalogue, entries=entries)


class _Trial:
    """The test of one model's claims.

    Args:
        model: The model.
        catalogue: Its catalogue.
    """

    def __init__(self, model: LoadedModel, catalogue: Catalogue) -> None:
        self._model = model
        self._catalogue = catalogue
        self._scope: PassScope = catalogue.scope

    def run(self, trace: Trace | None) -> Generator[None, None, dict[Extractor, _Found]]:
        """Test every claim in steps; return what was found about each extractor."""
        claims = {
            extractor: self._claimed(extractor)
            for extractor, kind in KINDS.items()
            if isinstance(kind, CompiledKind) or (kind.nodes and trace)
        }
        points = list(dict.fromkeys(point for each in claims.values() for point in each))
        found: dict[Extractor, _Found] = {}
        if not points:
            return found
        specs = self._catalogue.specs
        steps = {point: sample_step(specs[point], len(points)) for point in points}
        seen = yield from self._cases(steps)
        cases = [case for case, _ in seen]
        for extractor, claimed in claims.items():
            kind = KINDS[extractor]
            if isinstance(kind, CompiledKind) and kind.slow:
                found[extractor] = _Found(sometimes(claimed, cases))
            elif isinstance(kind, CompiledKind) and claimed:
                faults = yield from self._programs(kind, claimed, steps, seen)
                found[extractor] = _Found(faults)
            elif trace and claimed:
                found[extractor] = yield from self._graph(trace, claimed, cases)
        return found

    def _claimed(self, extractor: Extractor) -> list[CapturePoint]:
        """Return the points of modules that an extractor claims to serve, in execution order."""
        return list(
            dict.fromkeys(
                entry.points[side]
                for entry in self._catalogue
                # The input of a call exists before its output does.
                for side in (Capture.INPUT, Capture.OUTPUT)
                if side in entry.points
                and entry.points[side].kind is PointKind.MODULE
                and entry.serves(extractor, side)
            )
        )

    def _looks(self, x: Batch) -> LooksSurvey:
        """Return how a pass on a batch uses its values; empty if the model was seen to use none."""
        if not self._catalogue.looks.looked:
            return LooksSurvey()
        with self._scope:
            return survey_looks(self._model, x)

    def _cases(
        self, steps: Mapping[CapturePoint, int]
    ) -> Generator[None, None, list[tuple[Case, LooksSurvey]]]:
        """Run the model on each batch, and leave out batches that it can't take."""
        model = self._model
        cases: list[tuple[Case, LooksSurvey]] = []

        def add(x: Batch | None, *, ordinary: bool = False) -> bool:
            if x is None:
                return False
            case = run_case(model, self._scope, x, steps, ordinary=ordinary)
            cases.extend([(case, self._looks(x))] if case else [])
            return case is not None

        add(ordinary_batch(model, 2), ordinary=True)
        yield
        if not add(wide_batch(model, 3)):
            yield
            add(ordinary_batch(model, 3), ordinary=True)
        yield
        if not model.signature.has_floats:
            for x in reaching_batches(model):
                add(x)
                yield
        if not add(bytes_batch(model)):
            yield
            add(ordinary_batch(model, 1), ordinary=True)
        yield
        return cases

    def _graph(
        self, trace: Trace, points: Sequence[CapturePoint], cases: Sequence[Case]
    ) -> Generator[None, None, _Found]:
        """Compare the values of the symbolic graph with the model's on all batches but the first.

        The first batch has ordinary numbers; the graph already ran on them at measuring.
        """
        nodes: dict[str, list[CapturePoint]] = {}
        for point in points:
            nodes.setdefault(trace.names.node_of(point) or "", []).append(point)
        differ: dict[CapturePoint, str] = {}
        dead: dict[CapturePoint, str] = {}
        graphs = [(trace.whole, trace.names.eval, differ)]
        if trace.pruned is not None:
            graphs.append((trace.pruned, trace.useful, dead))
        for case in cases[1:]:
            for extractor, names, faults in graphs:

                def compare(
                    index: int,
                    value: torch.Tensor,
                    case: Case = case,
                    names: tuple[str, ...] = names,
                    faults: Faults = faults,
                ) -> None:
                    for point in nodes.get(names[index], ()):
                        true = case.digests.get(point)
                        if true is not None and (fault := true.fault(value, 0.0)):
                            faults.setdefault(
                                point,
                                f"at batch size {case.x.size} the symbolic graph differs from the "
                                f"model: {fault}",
                            )

                try:
                    with self._scope:
                        extractor.run(case.x.clone(), compare)
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    reason = (
                        f"the symbolic graph fails at batch size {case.x.size} ({own_words(error)})"
                    )
                    return _Found(dict.fromkeys(points, reason), reason)
                yield
        return _found_of_graph(trace, nodes, differ, dead)

    def _programs(
        self,
        kind: CompiledKind[Any],
        points: Sequence[CapturePoint],
        steps: Mapping[CapturePoint, int],
        seen: Sequence[tuple[Case, LooksSurvey]],
    ) -> Generator[None, None, Faults]:
        """Return the faults of programs; see Note [Examples to record from] in ``plan_builder``.

        Where sizes depend on the content, programs depend on how many elements the example has of
        each kind: one element is recorded as a number. There every program must hold, as a plan may
        be recorded from any example.
        """
        found: list[Faults] = []
        sized: set[CapturePoint] = set()
        surveys: list[LooksSurvey] = []
        for size in (2, 1):
            example = ordinary_batch(self._model, size)
            looks = self._looks(example)
            surveys.append(looks)
            sized |= looks.sized.intersection(points)
            yield
            cases = [replace(case, astray=_astray(looks, other)) for case, other in seen]
            unrepeated = [point for point in points if _is_unrepeated(point, looks, cases)]
            rest = [point for point in points if point not in unrepeated]
            faults = yield from self._trial(kind, steps, example, cases, rest)
            found.append({**faults, **dict.fromkeys(unrepeated, UNREPEATED)})
            if not sized and not any(map(depends_on_size, faults.values())):
                break
        # Any subset of what one example serves can be served together.
        best = min(found, key=len)
        faults = {p: each for faults in found for p, each in faults.items() if p in sized} | best
        left = [point for point in points if point not in faults]
        return faults | (yield from self._other_ways(kind, left, steps, seen, surveys[0]))

    def _other_ways(
        self,
        kind: CompiledKind[Any],
        points: Sequence[CapturePoint],
        steps: Mapping[CapturePoint, int],
        seen: Sequence[tuple[Case, LooksSurvey]],
        common: LooksSurvey,
    ) -> Generator[None, None, Faults]:
        """Return the faults of programs for ways of the code other than the common one.

        Such a way is compiled when a request first takes it, so it must be possible.
        """
        found: Faults = {}
        ways = {looks.outcome: looks for _, looks in seen if looks.outcome != common.outcome}
        for looks in [*ways.values()][:MAX_OTHER_WAYS]:
            cases = [
                replace(case, astray=frozenset())
                for case, other in seen
                if other.outcome == looks.outcome
            ]
            astray = _astray(common, looks).intersection(points) - found.keys()
            rest = [point for point in points if point in astray]
            tried: list[Faults] = []
            for example in _examples(cases) if rest else ():
                yield
                tried.append((yield from self._trial(kind, steps, example, cases, rest)))
                if not any(map(depends_on_size, tried[-1].values())):
                    break
            faults = min(tried, key=len, default=Faults())
            found |= {point: f"{_OTHER_WAY}{reason}" for point, reason in faults.items()}
        return found

    def _trial(
        self,
        kind: CompiledKind[Any],
        steps: Mapping[CapturePoint, int],
        example: Batch,
        cases: Sequence[Case],
        points: Sequence[CapturePoint],
    ) -> Generator[None, None, Faults]:
        # Not the taps for requests: the hooks of this trial would slow down their passes.
        taps = Taps(self._model.module)
        context = BuildContext(self._model, taps, self._scope, self._catalogue.graph)
        try:
            return (yield from CompileTrial(context, kind, steps, example, cases).faults(points))
        finally:
            taps.close()


def _examples(cases: Sequence[Case]) -> list[Batch]:
    """Return the batches to record from; see Note [Examples to record from] in ``plan_builder``."""
    several = [case.x for case in cases if case.x.size > 1]
    single = [case.x for case in cases if case.x.size == 1]
    return [*several[:1], *single[:1]]


def _astray(example: LooksSurvey, looks: LooksSurvey) -> frozenset[CapturePoint]:
    """Return the points before which the code goes another way than for the example."""
    points = example.looked.keys() | looks.looked.keys()
    return frozenset(p for p in points if looks.before(p) != example.before(p))


def _is_unrepeated(point: CapturePoint, example: LooksSurvey, cases: Sequence[Case]) -> bool:
    """Return whether the code looks at a fraction before a point that no other sample has.

    Batches of ordinary numbers have items in common, so they don't count.
    """
    fraction = any(map(is_fraction, example.before(point)))
    return fraction and all(point in case.astray for case in cases if not case.ordinary)


def _found_of_graph(
    trace: Trace, nodes: Mapping[str, Sequence[CapturePoint]], differ: Faults, dead: Faults
) -> _Found:
    """Return what to refuse if values of the graph, or of its pruned version, differ."""
    lost = [point for point in dead if point not in differ]
    if lost:
        # A graph that is cut for a few layers may lack these nodes, too.
        useless = set(trace.names.eval) - set(trace.useful)
        lost += [point for node in useless for point in nodes.get(node, ())]
    faults = {**dict.fromkeys(lost, _DEAD), **differ}
    astray = next(iter(differ), None)
    if astray is None:
        return _Found(faults, _DEAD if lost else "")
    return _Found(
        faults,
        f"the symbolic graph and the model compute different values of {astray.path!r}",
    )


def _kept(entry: LayerEntry, found: Mapping[Extractor, _Found]) -> LayerEntry:
    support = dict(entry.support)
    for extractor, each in found.items():
        reasons = {
            side: each.nodes if point.kind is PointKind.NODE else each.faults.get(point, "")
            for side, point in entry.points.items()
        }
        support[extractor] = support[extractor].without(reasons)
    return replace(entry, support=support)
