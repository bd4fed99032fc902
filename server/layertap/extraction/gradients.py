"""Gradients of an objective with respect to values of a pass.

Note [Which value a gradient belongs to]
    A gradient is that with respect to what the module returned, or was given, at that moment. So
    the model goes on with a copy of the value, which is a new node of autograd's graph: a later
    in-place operation changes the copy and its node's successors, but not the node. What the model
    computes from the same memory by another way, such as the input that ``nn.Identity`` returned,
    is no part of the gradient.

Note [What is recorded]
    No parameter requires a gradient, so autograd records nothing before the first of these values.
    The backward pass ends at the values, too: it is asked for the gradients of their nodes only,
    writes no ``.grad``, and its graph is freed when the pass ends. The forward pass ends after the
    last value that the objective and the other captures need.

Note [Saved values that change]
    An operation keeps some of its operands or results for the backward pass. If the model then
    changes them in place, as ``y = relu(x); y += x`` does, autograd refuses the backward pass, and
    such a model can't be trained. torch can copy what it keeps before it changes, at a cost for
    each operation. So this is done only for models for which a trial without it failed, and for one
    pass of the process at a time, as torch has one such switch.

Note [Gradients of each item]
    A batch's numbers are added up before they are differentiated. That gives each item's own
    gradient if no item influences another one's number. Where that was not shown, or a value has no
    batch dimension, each item runs in a pass of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.graph import (
    GradientEdge,
    allow_mutation_on_saved_tensors,
    get_gradient_edge,
    saved_tensors_hooks,
)

from layertap.errors import InvalidInputError
from layertap.extraction.attribution import Attribution
from layertap.extraction.containers import plain
from layertap.extraction.guided import guided_relus, relus_before
from layertap.extraction.interventions import Changes, PassRows
from layertap.extraction.kinds.base import BuildContext
from layertap.extraction.norm_gradients import right_norm_gradients
from layertap.extraction.operands import ItemAxis, Measured, Operands, check_range
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.points import CapturePoint, PointKind, Sink, ValueSpec
from layertap.extraction.sweeps import Base, SentBaseline, SweepTotal, SweptPass, steps_of
from layertap.extraction.taps import Edit, Watch
from layertap.listing import listed
from layertap.models import Batch
from layertap.models.tensor_content import plain_tensors
from layertap.selection import Method, Sweep

__all__ = ["BoundGradients", "GradientExtractor", "SavedBytes", "Shapes", "point_name"]


_GUIDED = Method.GUIDED_BACKPROPAGATION

_one_keeps = threading.Lock()
"""Held by a pass that copies saved values; see Note [Saved values that change]."""


@contextmanager
def _keeping_saved() -> Iterator[None]:
    with _one_keeps, allow_mutation_on_saved_tensors():
        yield


class _Mark(torch.autograd.Function):
    """Returns a copy of a value as a new node of the graph, even if no graph led to the value."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, value: torch.Tensor, root: torch.Tensor
    ) -> torch.Tensor:
        """Copy the value; ``root`` requires a gradient, so the copy does."""
        return value.clone()

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Pass the gradient on to the value."""
        return gradients[0], None


def point_name(point: CapturePoint) -> str:
    """Return a point's name for messages: the path, with what is captured there."""
    if point.is_report:
        return point.report_name
    path = f"inputs.{point.path}" if point.kind is PointKind.INPUT else point.path or "output"
    call = f" (call {point.call})" if point.call else ""
    member = "".join(f"[{key}]" for key in point.member)
    return (
        f"{path}{member}:{point.capture}{call}"
        if point.capture == "input"
        else (f"{path}{member}{call}")
    )


class Shapes(NamedTuple):
    """What a pass with gradients works on.

    Attributes:
        axes: Where the items are in the value of each term of the objective.
        terms: The shape of an item's part of each of these values.
        outputs: What is made for each point.
        dtypes: The dtype of each of these values.
    """

    axes: Sequence[ItemAxis]
    terms: tuple[tuple[int, ...], ...]
    outputs: Sequence[Attribution]
    dtypes: Sequence[torch.dtype] = ()

    @property
    def takes_batches(self) -> bool:
        """Whether every value has a batch dimension, so that a pass may have several items."""
        outputs = [ItemAxis.of(each.spec) for each in self.outputs]
        return all(each.axis is not None for each in (*self.axes, *outputs))


class GradientExtractor:
    """Runs the model with its taps, then autograd from the objective to the requested values.

    Args:
        context: The model, its taps and scope.
        pass_spec: What to capture; it has an objective.
        shapes: What its passes work on.
        keeps_saved: Whether saved values are copied before they change; see Note [Saved values
            that change].
        rows: The number of items that a pass of a sweep may have, if the request itself has fewer.
        trial: Whether only the first and the last step of a sweep are run.
    """

    def __init__(
        self,
        context: BuildContext,
        pass_spec: PassSpec,
        shapes: Shapes,
        *,
        keeps_saved: bool = False,
        rows: int = 1,
        trial: bool = False,
    ) -> None:
        if pass_spec.objective is None:
            raise ValueError("gradients need an objective")
        self._context = context
        self._keeps_saved = keeps_saved
        self._rows = rows
        self._trial = trial
        self.points = pass_spec.points
        self.terms = pass_spec.objective.terms
        self.shapes = shapes
        self._marks: dict[CapturePoint, list[int]] = {}
        self._sweeps: dict[CapturePoint, list[int]] = {}
        for index, point in enumerate(self.points):
            if point.sweep is not None:
                self._sweeps.setdefault(replace(point, companion=False), []).append(index)
            elif point.gradient:
                self._marks.setdefault(point.value, []).append(index)

    @property
    def sweeps(self) -> bool:
        """Whether it takes gradients at several values for each item."""
        return bool(self._sweeps)

    def rows_for(self, size: int) -> int:
        """Return the number of items in the largest pass of a request of ``size`` items."""
        steps = max((point.sweep.steps + 1 for point in self._sweeps if point.sweep), default=1)
        return max(size, min(size * steps, self._rows))

    def run(self, x: Batch, sink: Sink) -> None:
        """Raise ValueError: a pass with gradients needs operands; see ``run_with``."""
        raise ValueError("a pass with gradients needs the operands of its objective")

    def run_with(
        self,
        operands: Operands,
        x: Batch,
        sink: Sink,
        *,
        alone: bool = False,
        changes: Changes | None = None,
        rows: PassRows | None = None,
    ) -> None:
        """Run a batch together; see ``BuiltExtractor.run``.

        Args:
            operands: The operands of the batch.
            x: The batch.
            sink: Receives the values.
            alone: Whether the items of a batch may influence each other, so that a sweep must not
                run as further items of the batch.
            changes: The interventions of the request; None if there are none.
            rows: Which of the request's items the batch has; None for all of them.

        Raises:
            InvalidInputError: If the objective does not depend on one of the values.
        """
        mine = _Interventions(changes, rows or PassRows.whole(x.size))
        # The model may write into its batch, which the passes of a sweep need again.
        given = x.clone() if self._sweeps else x
        main = self._one(_Pass(self, operands, x.size, self._marks, sink, changes=mine), given)
        if changes is not None:
            changes.tally.end_pass()
        most = 1 if alone or not self.shapes.takes_batches else self._rows
        for point, indexes in self._sweeps.items():
            self._sweep(point, indexes, main, x, sink, most=max(1, most // x.size))

    def run_alone(
        self, operands: Operands, x: Batch, sink: Sink, changes: Changes | None = None
    ) -> None:
        """Run each item of a batch in a pass of its own; see Note [Gradients of each item].

        Args:
            operands: The operands of the batch.
            x: The batch.
            sink: Receives the values of all items together.
            changes: The interventions of the request; None if there are none.
        """
        kept: list[list[torch.Tensor]] = [[] for _ in self.points]

        def keep(index: int, value: torch.Tensor) -> None:
            kept[index].append(value.clone())

        for item in range(x.size):
            mine = operands.narrow(item, self.shapes.terms)
            one = x.narrow(item, 1).clone()
            rows = PassRows((item,), x.size)
            self.run_with(mine, one, keep, alone=True, changes=changes, rows=rows)
        for index, (values, output) in enumerate(zip(kept, self.shapes.outputs, strict=True)):
            sink(index, _joined(values, output.spec, self.points[index]))

    def _one(self, one: _Pass, x: Batch) -> _Pass:
        """Run a pass forwards and backwards."""
        keeping = _keeping_saved() if self._keeps_saved else nullcontext()
        with (
            self._context.scope as scope,
            torch.inference_mode(False),
            torch.enable_grad(),
            keeping,
        ):
            edits, watches = one.edits()
            self._context.taps.run(
                self._context.model.forward,
                one.marked_inputs(x),
                one.watched,
                one.see,
                to_end=not scope.rules.early_stop,
                own_threads=scope.rules.own_threads,
                edits=edits,
                watches=watches,
                raw=True,
            )
            one.differentiate()
        return one

    def _sweep(
        self,
        point: CapturePoint,
        indexes: Sequence[int],
        main: _Pass,
        x: Batch,
        sink: Sink,
        *,
        most: int,
    ) -> None:
        """Run the passes of a sweep; see Note [Sweeps] in ``sweeps``.

        Args:
            point: The point of the sweep.
            indexes: The indexes of what is captured of it.
            main: The pass at the value itself.
            x: The batch.
            sink: Receives the result.
            most: Steps that may run in one pass.
        """
        if point.sweep is None:
            raise AssertionError("the point of a sweep has its options")
        steps = steps_of(point.method, point.sweep)
        steps = [steps[0], steps[-1]] if self._trial else steps
        operands = main.fixed_operands()
        spec = self.shapes.outputs[indexes[0]].spec
        axis = ItemAxis.of(spec) if self.shapes.takes_batches else ItemAxis(None)
        base = self._base(point.sweep, spec, operands, x.size)
        total = SweepTotal(point.method, base)
        for begin in range(0, len(steps), most):
            swept = SweptPass(point.method, point.sweep, steps[begin : begin + most], axis, base)
            times = len(swept.steps)
            one = _Pass(
                self,
                operands.repeated(times, self.shapes.terms),
                times * x.size,
                {point.value: []},
                None,
                swept=swept,
                changes=main.changes.repeated(times),
            )
            self._one(one, Batch.cat([x] * times))
            total.add(swept, one.only_gradient, one.numbers)
            total.see(one.swept_value)
        result = total.result()
        for index in indexes:
            if not self.points[index].companion:
                sink(index, result.to(spec.dtype))
            else:
                found = axis.items(result, x.size).flatten(1).sum(1)
                gap = found - (main.numbers - total.at_baseline).to(found.dtype)
                sink(index, gap.to(spec.dtype))

    def check(self, operands: Operands, size: int, *, shapes: bool = True) -> None:
        """Check the operands of a request against the values that they are for.

        Args:
            operands: The operands.
            size: The number of items.
            shapes: Whether the shapes of the objective's values are known before the pass.

        Raises:
            InvalidInputError: If an index, a vector or a baseline doesn't fit, or a number is too
                large for the model's dtype.
        """
        if shapes:
            operands.check(self.shapes.terms, size)
        operands.check_range(self.shapes.dtypes)
        for point, indexes in self._sweeps.items():
            spec = self.shapes.outputs[indexes[0]].spec
            if point.sweep is not None and not spec.dynamic:
                self._base(point.sweep, spec, operands, size)

    def _base(self, sweep: Sweep, spec: ValueSpec, operands: Operands, size: int) -> Base:
        """Return the baseline of integrated gradients, in the shape of the value."""
        if not isinstance(sweep, SentBaseline):
            number = float(sweep.baseline)
            check_range("sweep: baseline", abs(number), spec.dtype)
            return number
        axis = ItemAxis.of(spec)
        items = operands.baseline(sweep.number, axis.shape_per_item(spec), size)
        check_range(
            "sweep: baseline", float(items.abs().amax()) if items.numel() else 0, spec.dtype
        )
        items = items.expand(size, *items.shape[1:])
        base = axis.joined(items, spec.shape(size))
        return base.to(self._context.model.device, spec.dtype)


def _joined(values: list[torch.Tensor], spec: ValueSpec, point: CapturePoint) -> torch.Tensor:
    """Return the values of a batch, given those of its items."""
    axis = ItemAxis.of(spec).axis
    if axis is None:
        raise InvalidInputError(
            f"layers: the value of {point_name(point)!r} has no batch dimension, so its gradients "
            f"are served for one item per request"
        )
    if len({(*value.shape[:axis], *value.shape[axis + 1 :]) for value in values}) > 1:
        raise InvalidInputError(
            f"layers: the value of {point_name(point)!r} differs in size between the items, so its "
            f"gradients are served for one item per request"
        )
    return torch.cat(values, axis)


@dataclass(frozen=True, eq=False)
class BoundGradients:
    """A gradient extractor with the operands of a request, a ``BuiltExtractor``.

    Attributes:
        extractor: The extractor.
        operands: The operands.
        alone: Whether each item needs a pass of its own.
    """

    extractor: GradientExtractor
    operands: Operands
    alone: bool

    def run(self, x: Batch, sink: Sink) -> None:
        """See BuiltExtractor."""
        alone = self.alone or not self.extractor.shapes.takes_batches
        if x.size > 1 and alone:
            self.extractor.run_alone(self.operands, x, sink)
        else:
            self.extractor.run_with(self.operands, x, sink, alone=alone)


@dataclass(frozen=True)
class _Interventions:
    """The interventions of a pass.

    Attributes:
        changes: The interventions of the request; None if there are none.
        rows: The rows of the pass.
        count: Whether they count in the report.
    """

    changes: Changes | None
    rows: PassRows
    count: bool = True

    def repeated(self, times: int) -> _Interventions:
        """Return those of a pass that has all rows several times; they don't count again."""
        return replace(self, rows=replace(self.rows, blocks=(1,) * times), count=False)

    def edits(self) -> tuple[list[Edit], list[Watch]]:
        """Return the edits, and what to watch for them."""
        if self.changes is None:
            return [], []
        return self.changes.edits(self.rows, count=self.count)


class _Pass:
    """One pass with gradients.

    Args:
        extractor: The extractor.
        operands: The operands of the batch.
        size: The number of items.
        marks: The values whose gradients to compute, with the indexes of what is made of each.
        sink: Receives the values; None for a pass of a sweep.
        swept: What the pass has in place of the only marked value; None for the model's own.
        changes: Its interventions.

    Attributes:
        changes: The same.
        watched: What the taps capture: the requested values, and those of the objective's terms.
        numbers: The number of each item, ``[B]``; set by ``differentiate``.
        only_gradient: The gradient of a sweep's value; set by ``differentiate``.
        swept_value: The model's own value in the place of a sweep, for the items of one step.
    """

    def __init__(
        self,
        extractor: GradientExtractor,
        operands: Operands,
        size: int,
        marks: Mapping[CapturePoint, Sequence[int]],
        sink: Sink | None,
        *,
        swept: SweptPass | None = None,
        changes: _Interventions,
    ) -> None:
        self.changes = changes
        self._points, self._terms = extractor.points, extractor.terms
        self._axes, self._outputs = extractor.shapes.axes, extractor.shapes.outputs
        self._operands, self._size, self._sink = operands, size, sink
        self._marks, self._swept = marks, swept
        self._root = torch.zeros((), requires_grad=True)
        self._edges: dict[CapturePoint, GradientEdge] = {}
        self._activations: dict[CapturePoint, torch.Tensor] = {}
        self._cut: set[CapturePoint] = set()
        self._measured: dict[int, Measured] = {}
        self._values = [
            index
            for index, point in enumerate(self._points)
            if point.kind is PointKind.MODULE and not point.gradient and sink is not None
        ]
        self.watched = [
            *(self._points[index] for index in self._values),
            *(term.point for term in self._terms),
        ]
        self.numbers: torch.Tensor
        self.only_gradient: torch.Tensor
        self.swept_value: torch.Tensor

    def edits(self) -> tuple[list[Edit], list[Watch]]:
        """Return the edits that change values or mark them, and what to watch for them."""
        edits, watches = self.changes.edits()
        # The gradient of a value that is changed is that of what the model goes on with.
        marks = (
            Edit(point, partial(self._mark, point))
            for point in self._marks
            if point.kind is PointKind.MODULE
        )
        return [*edits, *marks], watches

    def marked_inputs(self, x: Batch) -> Batch:
        """Return the batch with those of its tensors marked whose gradients are requested."""
        # Tensors that were made in inference mode can't take part in a graph; their copies can.
        tensors = {name: t.clone() if t.is_inference() else t for name, t in x.items()}
        for point in self._marks:
            if point.kind is PointKind.INPUT:
                tensors[point.path] = self._mark(point, tensors[point.path])
        return Batch(tensors)

    def _mark(self, point: CapturePoint, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            raise InvalidInputError(
                f"layers: {point_name(point)!r} is {value.dtype}, which has no gradient"
            )
        if self._swept is not None:
            self.swept_value = self._swept.split(value.detach())[0].clone()
            value = self._swept.change(value.detach())
        marked: torch.Tensor = _Mark.apply(value, self._root)
        # Otherwise the model's code turned gradients off, which is reported after the pass: an
        # error here could be caught by the model.
        if marked.requires_grad:
            self._edges[point] = get_gradient_edge(marked)
        else:
            self._cut.add(point)
        if any(self._outputs[index].needs_value for index in self._marks[point]):
            # A copy, because the model may change both the value and the marked one in place.
            self._activations[point] = value.detach().clone()
        return marked

    def see(self, watched: int, value: torch.Tensor) -> None:
        """Capture a value, or make the numbers of a term from it."""
        if watched < len(self._values) and self._sink is not None:
            self._sink(self._values[watched], plain(value))
            return
        term = watched - len(self._values)
        items = self._axes[term].items(value, self._size)
        self._measured[term] = self._operands.measure(term, items)

    def differentiate(self) -> None:
        """Compute the gradients, and capture them and the objective."""
        weighted = [
            self._measured[index].numbers * term.weight
            for index, term in enumerate(self._operands.terms)
        ]
        numbers = weighted[0]
        for more in weighted[1:]:
            numbers = numbers + more
        self.numbers = numbers.detach()
        total = numbers.sum()
        if self._sink is None:
            (self.only_gradient,) = self._gradients(total, self._edges)
            return
        self._check_edges(total)
        guided = [
            point
            for point, indexes in self._marks.items()
            if any(self._points[index].method is _GUIDED for index in indexes)
        ]
        plain = [
            point
            for point, indexes in self._marks.items()
            if any(self._points[index].method is not _GUIDED for index in indexes)
        ]
        for point, gradient in zip(
            plain, self._gradients(total, plain, keep=bool(guided)), strict=True
        ):
            value = self._activations.get(point, gradient)
            for index in self._marks[point]:
                if self._points[index].method is not _GUIDED:
                    self._sink(index, self._outputs[index].combine(value, gradient))
        if guided:
            self._sink_guided(total, guided, self._sink)
        self._report(self._sink)

    def _sink_guided(self, total: torch.Tensor, points: Sequence[CapturePoint], sink: Sink) -> None:
        """Go back again, with every ReLU letting only positive gradients pass."""
        counts = relus_before(total, [self._edges[point] for point in points])
        for point, count in zip(points, counts, strict=True):
            if not count:
                raise InvalidInputError(
                    f"method: GUIDED_BACKPROPAGATION of layer {point_name(point)!r}: no ReLU is on "
                    f"the way from the objective to it, so this would be its plain gradient; other "
                    f"activations, such as GELU, SiLU and ReLU6, are not changed"
                )
        with guided_relus(total):
            found = self._gradients(total, points)
        for point, gradient, count in zip(points, found, counts, strict=True):
            for index in self._marks[point]:
                if self._points[index].method is not _GUIDED:
                    continue
                if self._points[index].companion:
                    sink(index, torch.full((self._size,), count, dtype=torch.int64))
                else:
                    sink(index, gradient)

    def fixed_operands(self) -> Operands:
        """Return the operands with the elements that this pass has found."""
        return self._operands.fixed(
            [self._measured[term].places for term in range(len(self._terms))]
        )

    def _check_edges(self, total: torch.Tensor) -> None:
        """Raise InvalidInputError if the objective can't depend on one of the values."""
        if not self._marks:
            return
        missing = [point for point in self._marks if point not in self._edges]
        if missing:
            cut = missing[0] in self._cut
            reason = "the model turns gradients off there" if cut else "it did not run before that"
            raise InvalidInputError(self._independent(missing[0], reason))
        if not total.requires_grad:
            first = next(iter(self._edges))
            raise InvalidInputError(self._independent(first, "no differentiable way leads there"))

    def _gradients(
        self, total: torch.Tensor, points: Iterable[CapturePoint], *, keep: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Return the gradients of some values.

        Args:
            total: The sum of the items' numbers.
            points: The values.
            keep: Whether the graph is needed again.
        """
        points = list(points)
        if not points:
            return ()
        self._check_edges(total)
        edges = [self._edges[point] for point in points]
        with right_norm_gradients(total):
            found = torch.autograd.grad(total, edges, allow_unused=True, retain_graph=keep)
        for point, gradient in zip(points, found, strict=True):
            if gradient is None:
                raise InvalidInputError(
                    self._independent(point, "no differentiable way leads there")
                )
        return found

    def _independent(self, point: CapturePoint, reason: str) -> str:
        terms = listed(repr(point_name(term.point)) for term in self._terms)
        return (
            f"objective: {terms} does not depend on layer {point_name(point)!r} on this input "
            f"({reason}), so there is no gradient"
        )

    def _report(self, sink: Sink) -> None:
        found = [
            each.places
            for number, term in enumerate(self._terms)
            if term.measure.finds and (each := self._measured[number])
        ]
        for index, point in enumerate(self._points):
            if point.kind is not PointKind.OBJECTIVE:
                continue
            if point.path == "value":
                sink(index, self.numbers)
                continue
            places = found.pop(0)
            if places is None:
                raise AssertionError("a measure of one element has its index")
            sink(index, places)


@dataclass
class SavedBytes:
    """Counts the bytes that autograd keeps for the backward pass.

    Attributes:
        module: The model, whose own tensors don't count.
        nbytes: The bytes of the tensors that were kept in the block, each memory once.
        largest: The bytes of the largest of them.
    """

    module: nn.Module
    nbytes: int = 0
    largest: int = 0
    _seen: set[int] = field(default_factory=set)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count in a block."""
        own = (*self.module.parameters(), *self.module.buffers())
        plain = (tensor for each in own for tensor in plain_tensors(each))
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in plain}
        with saved_tensors_hooks(self._count, lambda tensor: tensor):
            yield

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        for each in plain_tensors(tensor):
            if each.layout is torch.strided and not each.is_meta:
                memory = each.untyped_storage()
                if memory.data_ptr() not in self._seen:
                    self._seen.add(memory.data_ptr())
                    self.nbytes += memory.nbytes()
                    self.largest = max(self.largest, memory.nbytes())
        return tensor
