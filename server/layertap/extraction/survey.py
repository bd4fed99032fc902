"""Surveys: runs a model and records the calls of its modules.

Nothing here relies on a declaration of the model's author or on the model's class. A layer is in
the catalogue because it ran, with the shapes that it had, and an extractor serves it because its
value equalled the reference.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layertap.extraction.attention import WEIGHTS, FusedAttention
from layertap.extraction.chance import Generators
from layertap.extraction.containers import flatten, plain, unsendable
from layertap.extraction.guards import Outcome, Tape, why_not
from layertap.extraction.kept_values import KeptValue, KeptValues
from layertap.extraction.looks import watch_looks
from layertap.extraction.points import CapturePoint, PointKind, ValueSpec
from layertap.extraction.symbolic import Trace
from layertap.extraction.taps import observe
from layertap.extraction.verify import same
from layertap.models import Batch, LoadedModel
from layertap.selection import Capture

__all__ = [
    "FxSurvey",
    "HookSurvey",
    "LooksSurvey",
    "Shape",
    "Shapes",
    "survey_first_item",
    "survey_fused",
    "survey_fx",
    "survey_hooks",
    "survey_looks",
    "survey_repeat",
    "survey_shapes",
    "survey_values",
    "survey_walk",
]

Shape = tuple[torch.dtype, tuple[int, ...]]

Shapes = Mapping[CapturePoint, tuple[int, ...]]
"""The shape of each point in one pass."""

_log = logging.getLogger(__name__)

_NEAR = 1e-2
"""Kernels for other batch sizes may differ by this much; different items differ by far more."""


@dataclass
class HookSurvey:
    """What hooks on every module saw in one forward pass.

    Attributes:
        order: (module path, call) in the order in which the calls began.
        shapes: The dtype and shape of every captured tensor.
        values: Every captured output, if these were requested.
        unsendable: For each value that can't be sent, why.
        quantized: The quantised dtype of each quantised value.
        threaded: The paths of the modules that ran in one of the model's own threads.
        mutated_input: Whether the pass changed the batch.
        random: The points that come after the model drew random numbers.
    """

    order: list[tuple[str, int]] = field(default_factory=list)
    shapes: dict[CapturePoint, Shape] = field(default_factory=dict)
    values: dict[CapturePoint, KeptValue] = field(default_factory=dict)
    unsendable: dict[CapturePoint, str] = field(default_factory=dict)
    quantized: dict[CapturePoint, str] = field(default_factory=dict)
    threaded: set[str] = field(default_factory=set)
    mutated_input: bool = False
    random: set[CapturePoint] = field(default_factory=set)


def survey_hooks(
    model: LoadedModel,
    x: Batch,
    *,
    keep_values: bool = False,
    look: Callable[[], None] | None = None,
) -> HookSurvey:
    """Run a model with hooks on every module; pass on the model's exceptions.

    Args:
        model: The model.
        x: The batch; it is not changed.
        keep_values: Whether to keep every output; see ``kept_values``.
        look: Called when a module's call begins and when it ends.
    """
    survey, kept = HookSurvey(), KeptValues()
    calls: Counter[tuple[str, Capture]] = Counter()
    recursive: set[str] = set()

    thread, lock = threading.get_ident(), threading.Lock()

    def see(path: str, side: Capture, value: Any) -> None:
        with lock:
            record(path, side, value)

    def record(path: str, side: Capture, value: Any) -> None:
        if threading.get_ident() != thread:
            survey.threaded.add(path)
        if look is not None:
            look()
        call = calls[path, side]
        calls[path, side] += 1
        if calls[path, Capture.INPUT] - calls[path, Capture.OUTPUT] > 1:
            recursive.add(path)
        if side is Capture.INPUT:
            survey.order.append((path, call))
        for way, tensor in flatten(value):
            point = CapturePoint(PointKind.MODULE, path, side, call, way)
            if generators.moved():
                survey.random.add(point)
            if reason := unsendable(tensor):
                survey.unsendable[point] = reason
                survey.shapes[point] = (
                    tensor.dtype,
                    () if tensor.is_nested else tuple(tensor.shape),
                )
                continue
            if tensor.is_quantized:
                survey.quantized[point] = str(tensor.dtype).removeprefix("torch.")
            sent = plain(tensor)
            survey.shapes[point] = (sent.dtype, tuple(sent.shape))
            # Attention weights are large, and no other value is compared with them.
            if keep_values and side is Capture.OUTPUT and WEIGHTS not in way:
                survey.values[point] = kept.keep(sent)

    given = x.clone()
    generators = Generators(model.device)
    with observe(model.module, see):
        model.forward(given)
    survey.mutated_input = not all(same(given[name], x[name]) for name in x)
    _refuse_recursive(survey, recursive - survey.threaded - {""})
    # If a module runs several times in such threads, the numbers of its calls vary by pass.
    for point in list(survey.values):
        if point.path in survey.threaded and calls[point.path, Capture.OUTPUT] > 1:
            del survey.values[point]
    return survey


def _refuse_recursive(survey: HookSurvey, paths: Collection[str]) -> None:
    """Mark results of modules that call themselves as unsendable: inner calls end first."""
    for point in survey.shapes:
        if point.path in paths and point.capture is Capture.OUTPUT:
            survey.unsendable[point] = "the module calls itself, so its calls can't be told apart"
            survey.values.pop(point, None)


def survey_first_item(
    model: LoadedModel,
    x: Batch,
    specs: Mapping[CapturePoint, ValueSpec],
    values: Mapping[CapturePoint, KeptValue],
) -> set[CapturePoint]:
    """Return the points at which the first item comes first along the batch dimension.

    Args:
        model: The model.
        x: A batch of two items.
        specs: The dtype and shape of each point to check.
        values: The outputs for the first item alone.
    """
    first: set[CapturePoint] = set()
    calls: Counter[str] = Counter()

    def see(path: str, side: Capture, value: Any) -> None:
        if side is Capture.INPUT:
            return
        call = calls[path]
        calls[path] += 1
        for way, tensor in flatten(value):
            point = CapturePoint(PointKind.MODULE, path, side, call, way)
            axis = specs[point].batch_axis if point in specs else None
            if axis is None or point not in values or tensor.ndim <= axis[0]:
                continue
            mine = plain(tensor).narrow(axis[0], 0, axis[1])
            if values[point].difference(mine) < _NEAR:
                first.add(point)

    with observe(model.module, see):
        model.forward(x.clone())
    return first


def survey_repeat(
    model: LoadedModel, x: Batch, values: Mapping[CapturePoint, KeptValue]
) -> set[CapturePoint]:
    """Run a model on the same batch again; return the points whose values have changed."""
    changed: set[CapturePoint] = set()
    calls: Counter[str] = Counter()

    def see(path: str, side: Capture, value: Any) -> None:
        if side is Capture.INPUT:
            return
        call = calls[path]
        calls[path] += 1
        for way, tensor in flatten(value):
            point = CapturePoint(PointKind.MODULE, path, side, call, way)
            if point in values and not values[point].same(plain(tensor)):
                changed.add(point)

    with observe(model.module, see):
        model.forward(x.clone())
    return changed


def survey_values(
    model: LoadedModel,
    x: Batch,
    turn: AbstractContextManager[object],
    take: Callable[[CapturePoint, torch.Tensor], None],
) -> None:
    """Run a model and pass on each value of a module; raise whatever the model raises.

    Args:
        model: The model.
        x: The batch; the model may write into it.
        turn: Held in the pass.
        take: Called with each point and its live tensor.
    """
    calls: Counter[tuple[str, Capture]] = Counter()

    def see(path: str, side: Capture, value: Any) -> None:
        call = calls[path, side]
        calls[path, side] += 1
        for way, tensor in flatten(value):
            if not unsendable(tensor):
                take(CapturePoint(PointKind.MODULE, path, side, call, way), plain(tensor))

    with turn, observe(model.module, see):
        model.forward(x)


def survey_shapes(
    model: LoadedModel, x: Batch, turn: AbstractContextManager[object]
) -> tuple[Shapes, bool]:
    """Return the shapes of a pass, and whether it ran to its end: a model may refuse a size."""
    shapes: dict[CapturePoint, tuple[int, ...]] = {}

    def see(point: CapturePoint, tensor: torch.Tensor) -> None:
        shapes[point] = tuple(tensor.shape)

    try:
        survey_values(model, x, turn, see)
    except Exception as error:  # noqa: BLE001 - whatever a model raises where it takes no such size
        _log.debug("model %s does not run on %s: %s", model.name, x.key, error)
        return shapes, False
    return shapes, True


@dataclass
class LooksSurvey:
    """How one forward pass used the values of its input.

    Attributes:
        looked: For each point after a look at values: the number of looks before it.
        outcome: What the looks gave, in order.
        unguarded: For each point after a look that has no guard: why it has none.
        python: For each point after something that ran in Python: what, as a clause; see Note
            [Code in Python].
        steps: For each point whose value depends on a discontinuous operation: the operation's
            name; see Note [Discontinuous steps].
        sized: The points after a value whose size depends on the content of the input.
        straight: The children that ran one after the other from the beginning of the pass, with no
            operation between them.
    """

    looked: dict[CapturePoint, int] = field(default_factory=dict)
    outcome: Outcome = ()
    unguarded: dict[CapturePoint, str] = field(default_factory=dict)
    python: dict[CapturePoint, str] = field(default_factory=dict)
    steps: dict[CapturePoint, str] = field(default_factory=dict)
    sized: set[CapturePoint] = field(default_factory=set)
    straight: list[str] = field(default_factory=list)

    def before(self, point: CapturePoint) -> Outcome:
        """Return what the looks before a point gave."""
        return self.outcome[: self.looked.get(point, 0)]


def survey_looks(model: LoadedModel, x: Batch) -> LooksSurvey:
    """Run a model and watch every operation.

    This needs its own pass: while operations are watched, torch runs some of them by other code, so
    the last bits of values differ.
    """
    survey = LooksSurvey()
    calls: Counter[tuple[str, Capture]] = Counter()
    children = dict(model.module.named_children())
    ended_at: int | None = 0  # Operations when the last child ended; None after an interruption.

    def follow(path: str, side: Capture) -> None:
        nonlocal ended_at
        if side is Capture.OUTPUT:
            ended_at = None if ended_at is None else looks.operations
        elif looks.operations == ended_at:
            survey.straight.append(path)
        else:
            ended_at = None

    def see(path: str, side: Capture, value: Any) -> None:
        if path in children:
            follow(path, side)
        call = calls[path, side]
        calls[path, side] += 1
        for way, tensor in flatten(value):
            point = CapturePoint(PointKind.MODULE, path, side, call, way)
            if looks.count:
                survey.looked[point] = len(tape.looks)
            if looks.sizes:
                survey.sized.add(point)
            if looks.python:
                survey.python[point] = looks.python[0]
            if step := looks.step(tensor):
                survey.steps[point] = step

    x = x.clone()
    tape = Tape(model.module, x)
    with watch_looks(model.module, x.tensors, tape) as looks, observe(model.module, see):
        model.forward(x)
    survey.outcome = tuple(look.outcome for look in tape.looks)
    reasons = [why_not(look, tape.elements) for look in tape.looks]
    for point, count in survey.looked.items():
        if reason := next(filter(None, reasons[:count]), ""):
            survey.unguarded[point] = reason
    return survey


def survey_fused(model: LoadedModel, x: Batch) -> set[str]:
    """Return the paths of the modules that use fused attention, and so compute no weights.

    This needs its own pass, like ``survey_looks``.
    """
    fused: set[str] = set()
    running: list[str] = []

    def see(path: str, side: Capture, value: Any) -> None:
        if side is Capture.INPUT:
            running.append(path)
        elif running:
            running.pop()

    def attends() -> None:
        if running:
            fused.add(running[-1])

    with FusedAttention(attends), observe(model.module, see):
        model.forward(x.clone())
    return fused


def survey_walk(
    model: LoadedModel,
    x: Batch,
    reference: Mapping[CapturePoint, KeptValue],
    straight: Collection[str],
) -> dict[str, str]:
    """Call the top-level children in order as long as each one's output equals the reference.

    Args:
        model: The model.
        x: The batch of one item for which the reference values were computed.
        reference: The reference values.
        straight: The children up to which ``forward`` only calls the children in order.

    Returns:
        For each child, why a walk over the children can't serve it; empty if it can.
    """
    reasons: dict[str, str] = {}
    broken = ""
    value = x.only.clone()
    for name, child in model.module.named_children():
        if not broken:
            value, broken = _step(name, child, value, reference)
        if not broken and name not in straight:
            broken = f"the forward pass does more than call the children in order up to {name!r}"
        reasons[name] = broken
    return reasons


@dataclass
class FxSurvey:
    """What running the symbolic graph showed.

    Attributes:
        equal: For each point that has a node, whether a request gets the reference value.
        shapes: The dtype and shape of every node whose value is a tensor.
        lost: The nodes whose value changes when dead-code elimination is applied to the graph.
        astray: The path of a module whose value in the graph differs from what it returned; empty
            if there is none. Then the graph and the model compute different values.
        unsendable: For each node whose value can't be sent, why.
    """

    equal: dict[CapturePoint, bool] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    astray: str = ""
    unsendable: dict[str, str] = field(default_factory=dict)


def survey_fx(
    trace: Trace,
    x: Batch,
    reference: Mapping[CapturePoint, KeptValue],
    turn: AbstractContextManager[object],
) -> FxSurvey:
    """Run the symbolic graph and compare each module's node with the reference.

    If some nodes look useless, the graph runs again without them. A node whose value then changes
    is ``lost``, because an extractor of a few layers would compute the changed value. If any node
    is lost, the useless nodes are lost too, as nodes before them may also look useless. ``turn`` is
    held in each pass.
    """
    points: dict[str, list[CapturePoint]] = {}
    for point in reference:
        node = trace.names.node_of(point) if not point.member else None
        if node is not None:
            points.setdefault(node, []).append(point)
    survey = FxSurvey()
    operations = set(trace.names.operations)
    whole: dict[str, KeptValue] = {}
    kept = KeptValues()

    def see(index: int, value: torch.Tensor) -> None:
        node = trace.names.eval[index]
        survey.shapes[node] = (value.dtype, () if value.is_nested else tuple(value.shape))
        if reason := unsendable(value):
            survey.unsendable[node] = reason
        for point in points.get(node, ()):
            survey.equal[point] = reference[point].same(value)
            if not survey.equal[point] and node not in operations:
                survey.astray = survey.astray or point.path
        if trace.pruned is not None and not reason:
            whole[node] = kept.keep(value)

    def compare(index: int, value: torch.Tensor) -> None:
        node = trace.useful[index]
        if node in whole and not whole[node].same(value):
            survey.lost.add(node)

    with turn:
        trace.whole.run(x.clone(), see)
    if trace.pruned is not None:
        with turn:
            trace.pruned.run(x.clone(), compare)
    if survey.lost:
        survey.lost |= set(trace.names.eval) - set(trace.useful)
        for node in survey.lost:
            survey.equal.update(dict.fromkeys(points.get(node, ()), False))
    return survey


def _step(
    name: str, child: nn.Module, x: torch.Tensor, reference: Mapping[CapturePoint, KeptValue]
) -> tuple[torch.Tensor, str]:
    expected = reference.get(CapturePoint(PointKind.MODULE, name))
    if expected is None:
        return x, f"child {name!r} does not run in the forward pass, or returns no tensor"
    try:
        y = child(x)
    except Exception:  # noqa: BLE001 - whatever a model raises, the walk ends here
        y = None
    if isinstance(y, torch.Tensor) and expected.same(plain(y)):
        return y, ""
    return x, f"the forward pass does not feed child {name!r} with the child registered before it"
