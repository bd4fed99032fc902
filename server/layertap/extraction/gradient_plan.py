"""Builds plans with gradients, by trying them on sample input.

Note [What a plan with gradients is compared with]
    To differentiate a value, the model goes on with a copy of it. A model that relies on the
    memory of a value, such as one that ignores what an in-place module returns, would compute
    something else then. So the values of the objective and of the layers in a pass with copies are
    compared with those of a plain pass; if they differ, the gradients are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from layertap.errors import ExtractorUnsupportedError, InvalidInputError, LayertapError
from layertap.extraction.attribution import Attribution, attribution
from layertap.extraction.base import Values
from layertap.extraction.gradients import GradientExtractor, SavedBytes, Shapes, point_name
from layertap.extraction.kinds.base import BuildContext
from layertap.extraction.kinds.registry import REFERENCE
from layertap.extraction.operands import ItemAxis, Operands
from layertap.extraction.out_of_memory import is_out_of_memory
from layertap.extraction.own_words import own_words
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.plan import Findings, GradientFacts, Plan, PlanKey
from layertap.extraction.points import CapturePoint, Dim, PointKind, ValueSpec
from layertap.extraction.prover import Prover
from layertap.extraction.samples import ordinary_batch
from layertap.extraction.verify import compiled_tolerance, mismatch
from layertap.models import Batch, BatchKey
from layertap.selection import Method

__all__ = ["GradientPlanner"]

SWEEP_BYTES = 256 << 20
"""Bytes that the gradients of one pass of a sweep may take, if a single item's take less."""

MAX_ROWS = 64
"""Maximum number of items of a pass of a sweep, if the request itself has fewer."""


class GradientPlanner:
    """Builds the plans with gradients of one model.

    Args:
        context: The model, its taps and scope.
        prover: Runs the model for its plain values.
        place: Adds what the catalogue knows of a value's layout to its type and shape.
    """

    def __init__(
        self,
        context: BuildContext,
        prover: Prover,
        place: Callable[[CapturePoint, ValueSpec, BatchKey], ValueSpec],
    ) -> None:
        self._context = context
        self._prover = prover
        self._place = place

    def steps(self, key: PlanKey) -> Iterator[Plan | None]:
        """Build a plan in steps of about one pass, on a compute thread; yield it at the end.

        Raises:
            InvalidInputError: If the model can't run on such items, or the objective does not
                depend on one of the layers.
            ExtractorUnsupportedError: If the model can't be differentiated there.
        """
        spec = key.pass_spec
        if spec.objective is None:
            raise ValueError("a plan with gradients needs an objective")
        _check_inputs(key)
        plain = spec.values
        cases = []
        for size in (1, 2):
            x = ordinary_batch(self._context.model, size, key.batch_key)
            cases.append(_Case(x, plain, self._prover.truth(PassSpec(plain), x)))
            yield None
        values = {
            point: self._place(
                point, ValueSpec.from_batches(one.dtype, one.shape, two.shape), key.batch_key
            )
            for point, one, two in zip(plain, cases[0].truth, cases[1].truth, strict=True)
        }
        trial = _Trial(self._context, self._prover, key, values)
        for case in cases:
            trial.run(case)
            yield None
        yield trial.plan()


class _Case(NamedTuple):
    """A batch, and the model's plain values for it at some points."""

    x: Batch
    points: tuple[CapturePoint, ...]
    truth: Values


class _Trial:
    """The trial of one pass spec with gradients.

    Args:
        context: The model, its taps and scope.
        prover: The prover of its plans.
        key: What the plan is for.
        values: The type and shape of each value of a module that the pass needs.
    """

    def __init__(
        self,
        context: BuildContext,
        prover: Prover,
        key: PlanKey,
        values: Mapping[CapturePoint, ValueSpec],
    ) -> None:
        self._context, self._prover, self._key = context, prover, key
        self._values = values
        self._spec = key.pass_spec
        self._terms = key.pass_spec.objective.terms if key.pass_spec.objective else ()
        specs = [values[term.point] for term in self._terms]
        self._axes = [ItemAxis.of(each) for each in specs]
        self._dynamic = any(each.dynamic for each in specs)
        self._term_shapes = tuple(
            axis.shape_per_item(each) for axis, each in zip(self._axes, specs, strict=True)
        )
        self._whole = replace(
            self._spec, points=tuple(dict.fromkeys((*self._spec.points, *values)))
        )
        self._keeps_saved = False
        self._nbytes: list[int] = []
        self._dtypes: dict[CapturePoint, torch.dtype] = {}

    def run(self, case: _Case) -> None:
        """Run a pass with gradients on a batch, and compare its values with the plain ones."""
        trial = self._extractor(self._whole, trial=True)
        if case.x.size > 1 and not trial.shapes.takes_batches:
            return
        try:
            self._run(trial, case)
        except ExtractorUnsupportedError:
            if self._keeps_saved or self._nbytes:
                raise
            self._keeps_saved = True
            self._run(self._extractor(self._whole, trial=True), case)

    def plan(self) -> Plan:
        """Return the plan; the batches have been run."""
        batch_key, values = self._key.batch_key, PassSpec(tuple(self._values))
        plain = Plan(
            REFERENCE,
            values,
            batch_key,
            tuple(self._values.values()),
            REFERENCE.build(self._context, values),
            Findings(),
        )
        first, *further = self._nbytes
        per_item = max(further[0] - first, 0) if further else 0
        rows = max(1, SWEEP_BYTES // max(1, per_item, 0 if further else first))
        extractor = self._extractor(self._spec, rows=min(rows, MAX_ROWS))
        facts = GradientFacts(extractor, self._dynamic, (first, per_item), plain)
        outputs = tuple(
            replace(self._output(point).spec, dtype=self._dtypes[point])
            for point in self._spec.points
        )
        return Plan(
            REFERENCE, self._spec, batch_key, outputs, extractor, Findings(), gradients=facts
        )

    def _extractor(
        self, spec: PassSpec, *, rows: int = 1, trial: bool = False, plain: bool = False
    ) -> GradientExtractor:
        outputs = [self._output(point) for point in spec.points]
        dtypes = [self._values[term.point].dtype for term in self._terms]
        shapes = Shapes(self._axes, self._term_shapes, outputs, dtypes)
        return GradientExtractor(
            self._context,
            spec,
            shapes,
            keeps_saved=self._keeps_saved and not plain,
            rows=rows,
            trial=trial,
        )

    def _run(self, trial: GradientExtractor, case: _Case) -> None:
        operands = Operands.example([term.measure for term in self._terms], self._term_shapes)
        found: dict[CapturePoint, torch.Tensor] = {}

        def keep(index: int, value: torch.Tensor) -> None:
            found[self._whole.points[index]] = value.clone()

        saved = SavedBytes(self._context.model.module)
        # While saved values are counted, autograd doesn't notice that they change. One gradient of
        # each value is counted: the passes of sweeps come one after the other.
        points = (each.as_gradient for each in self._whole.points)
        once = replace(self._whole, points=tuple(dict.fromkeys(points)))
        counted = self._extractor(once, plain=True)
        try:
            trial.run_with(operands, case.x.clone(), keep)
            with saved.counting():
                counted.run_with(operands, case.x.clone(), lambda index, value: None)
        except LayertapError:
            self._compare(found, case)
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise self._prover.out_of_memory(case.x) from error
            raise self._refused(own_words(error)) from error
        self._compare(found, case)
        self._dtypes = {point: value.dtype for point, value in found.items()}
        size = case.x.size
        kinds = {
            (each.value, each.method is Method.GUIDED_BACKPROPAGATION)
            for each in found
            if each.gradient
        }
        gradients = sum(self._value(point).bytes_per_item * size for point, _ in kinds)
        # A copy to go on with, a copy for methods and the gradient of each value. While autograd
        # goes back, it has two gradients at a time.
        self._nbytes.append(saved.nbytes + 3 * gradients + 2 * saved.largest)

    def _compare(self, found: Mapping[CapturePoint, torch.Tensor], case: _Case) -> None:
        """Refuse the gradients if a value of a pass with copies is not the model's own."""
        for point, expected in zip(case.points, case.truth, strict=True):
            if point not in found:
                continue
            fault = mismatch(found[point], expected, compiled_tolerance(expected))
            if fault:
                raise self._refused(
                    f"the model changes values in place in a way that a copy of them does not "
                    f"show: of {point_name(point)!r}, {fault}"
                )

    def _refused(self, reason: str) -> ExtractorUnsupportedError:
        return ExtractorUnsupportedError(
            f"gradients of model {self._context.model.name!r} can't be computed there: {reason}"
        )

    def _output(self, point: CapturePoint) -> Attribution:
        """Return what is made for a point, with its type and shape."""
        method = point.method if point.gradient and not point.companion else Method.GRADIENT
        return attribution(method, self._value(point), point_name(point.value), self._key.batch_key)

    def _value(self, point: CapturePoint) -> ValueSpec:
        """Return the type and shape of the value at a point."""
        batch = Dim(1, batch=True)
        if point.companion:
            counts = point.method is Method.GUIDED_BACKPROPAGATION
            return ValueSpec(torch.int64 if counts else torch.float32, (batch,))
        if point.kind is PointKind.INPUT:
            items = self._key.batch_key.items
            item = next(item for item in items if item.name == point.path)
            return ValueSpec(item.dtype, (batch, *map(Dim, item.shape)))
        if point.kind is not PointKind.OBJECTIVE:
            return self._values[point.value]
        if point.path == "value":
            return ValueSpec(torch.float32, (batch,))
        finding = [
            len(shape)
            for term, shape in zip(self._terms, self._term_shapes, strict=True)
            if term.measure.finds
        ]
        return ValueSpec(torch.int64, (batch, Dim(finding[point.call])))


def _check_inputs(key: PlanKey) -> None:
    given = {item.name for item in key.batch_key.items}
    for point in key.pass_spec.points:
        if point.kind is PointKind.INPUT and point.path not in given:
            raise InvalidInputError(
                f"layers: got the gradient of input {point.path!r}, which the request leaves out"
            )
