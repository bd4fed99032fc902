"""Surveys: runs a model and records the calls of its modules.

Nothing here is declared by the model's author or guessed from its class: a layer is in the
catalogue because it ran, with the shapes that it had, and an extractor serves it because its
value equalled the oracle's.
"""

from __future__ import annotations

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
from layertap.extraction.looks import watch_looks
from layertap.extraction.points import CapturePoint, PointKind, ValueSpec
from layertap.extraction.symbolic import Trace
from layertap.extraction.taps import observe
from layertap.extraction.verify import difference, same
from layertap.models import Batch, LoadedModel
from layertap.selection import Capture

__all__ = [
    "FxSurvey",
    "HookSurvey",
    "LooksSurvey",
    "Shape",
    "survey_first_item",
    "survey_fused",
    "survey_fx",
    "survey_hooks",
    "survey_looks",
    "survey_repeat",
    "survey_walk",
]

Shape = tuple[torch.dtype, tuple[int, ...]]

_NEAR = 1e-2
"""Kernels for another batch size may add in another order; another item differs by far more."""


@dataclass
class HookSurvey:
    """One forward pass, as hooks on every module saw it.

    Attributes:
        order: (module path, call) in the order in which the calls began.
        shapes: Every captured tensor's type and shape.
        values: A clone of every captured output, where they were requested.
        unsendable: Why nothing can be sent of a value, for those of which that is so.
        quantized: The quantised type of each value that is quantised.
        threaded: The paths of the modules that ran in a thread of the model's own.
        mutated_input: Whether the batch was another one afterwards.
        random: The points that come after the model drew random numbers.
    """

    order: list[tuple[str, int]] = field(default_factory=list)
    shapes: dict[CapturePoint, Shape] = field(default_factory=dict)
    values: dict[CapturePoint, torch.Tensor] = field(default_factory=dict)
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
    """Run a model with hooks on every module; raise whatever the model raises.

    Args:
        model: The model.
        x: The batch; it stays as it is.
        keep_values: Whether to keep a clone of every output.
        look: Called when a module begins and when it ends.
    """
    survey = HookSurvey()
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
            # Attention weights are large, and nothing is compared with them.
            if keep_values and side is Capture.OUTPUT and WEIGHTS not in way:
                survey.values[point] = sent.clone()

    given = x.clone()
    generators = Generators(model.device)
    with observe(model.module, see):
        model.forward(given)
    survey.mutated_input = not all(same(given[name], x[name]) for name in x)
    _refuse_recursive(survey, recursive - survey.threaded - {""})
    # Of a module that runs several times in such threads, each pass numbers the calls again.
    for point in list(survey.values):
        if point.path in survey.threaded and calls[point.path, Capture.OUTPUT] > 1:
            del survey.values[point]
    return survey


def _refuse_recursive(survey: HookSurvey, paths: Collection[str]) -> None:
    """Refuse the results of modules that call themselves, which end in another order than begun."""
    for point in survey.shapes:
        if point.path in paths and point.capture is Capture.OUTPUT:
            survey.unsendable[point] = "the module calls itself, so its calls can't be told apart"
            survey.values.pop(point, None)


def survey_first_item(
    model: LoadedModel,
    x: Batch,
    specs: Mapping[CapturePoint, ValueSpec],
    values: Mapping[CapturePoint, torch.Tensor],
) -> set[CapturePoint]:
    """Return the points whose first elements along the batch dimension are the first item's.

    Args:
        model: The model.
        x: A batch of two items.
        specs: The type and shape of each point to look at.
        values: What the first item alone gives.
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
            if difference(mine, values[point]) < _NEAR:
                first.add(point)

    with observe(model.module, see):
        model.forward(x.clone())
    return first


def survey_repeat(
    model: LoadedModel, x: Batch, values: Mapping[CapturePoint, torch.Tensor]
) -> set[CapturePoint]:
    """Run a model on the same batch again; return the points whose value is another one now."""
    changed: set[CapturePoint] = set()
    calls: Counter[str] = Counter()

    def see(path: str, side: Capture, value: Any) -> None:
        if side is Capture.INPUT:
            return
        call = calls[path]
        calls[path] += 1
        for way, tensor in flatten(value):
            point = CapturePoint(PointKind.MODULE, path, side, call, way)
            if point in values and not same(plain(tensor), values[point]):
                changed.add(point)

    with observe(model.module, see):
        model.forward(x.clone())
    return changed


@dataclass
class LooksSurvey:
    """What one forward pass did with its input's values, as far as it matters to what follows.

    Attributes:
        looked: The points that come after the model's code has looked at values, and the number
            of looks before each.
        outcome: What the looks gave, in order.
        unguarded: The points that come after a look for which there is no guard, and why.
        functions: The points that come after a Python function of autograd, and its name.
        steps: The points whose value follows from a discontinuous operation, and its name; see
            Note [Discontinuous steps].
        straight: The children that ran one after the other from the beginning, without any
            operation between them.
    """

    looked: dict[CapturePoint, int] = field(default_factory=dict)
    outcome: Outcome = ()
    unguarded: dict[CapturePoint, str] = field(default_factory=dict)
    functions: dict[CapturePoint, str] = field(default_factory=dict)
    steps: dict[CapturePoint, str] = field(default_factory=dict)
    straight: list[str] = field(default_factory=list)

    def before(self, point: CapturePoint) -> Outcome:
        """Return what the looks before a point gave."""
        return self.outcome[: self.looked.get(point, 0)]


def survey_looks(model: LoadedModel, x: Batch) -> LooksSurvey:
    """Run a model and watch every operation.

    A pass of its own: while operations are watched torch takes other ways through some of them, so
    that values differ in their last bits.
    """
    survey = LooksSurvey()
    calls: Counter[tuple[str, Capture]] = Counter()
    children = dict(model.module.named_children())
    ended_at: int | None = 0  # Operations when the last child ended; None once the row is broken.

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
            if looks.functions:
                survey.functions[point] = looks.functions[0]
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
    """Return the paths of the modules that attend in one fused operation, and so have no weights.

    A pass of its own, as ``survey_looks`` is.
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
    oracle: Mapping[CapturePoint, torch.Tensor],
    straight: Collection[str],
) -> dict[str, str]:
    """Walk the top-level children as long as each one's output equals the oracle's.

    Args:
        model: The model.
        x: The batch of one item for which the oracle gave its values.
        oracle: Those values.
        straight: The children up to which ``forward`` does nothing but call them in order.

    Returns:
        For each child, why the walk can't serve it; empty for those that it serves.
    """
    reasons: dict[str, str] = {}
    broken = ""
    value = x.only.clone()
    for name, child in model.module.named_children():
        if not broken:
            value, broken = _step(name, child, value, oracle)
        if not broken and name not in straight:
            broken = f"the forward pass does more than call the children in order up to {name!r}"
        reasons[name] = broken
    return reasons


@dataclass
class FxSurvey:
    """What the symbolic graph's nodes held.

    Attributes:
        equal: For each point that has a node, whether a request gets the oracle's value.
        shapes: The type and shape of every node whose value is a tensor.
        lost: Nodes whose value is another one once dead-code elimination has been at the graph.
        astray: A module's call whose value in the graph is not what the module returned; empty
            where there is none. The graph then computes something else than the model.
    """

    equal: dict[CapturePoint, bool] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    astray: str = ""


def survey_fx(
    trace: Trace,
    x: Batch,
    oracle: Mapping[CapturePoint, torch.Tensor],
    turn: AbstractContextManager[object],
) -> FxSurvey:
    """Run the symbolic graph and hold each module's node against the oracle.

    Where some nodes look useless, the graph is run once more without them: what is right only as
    long as they are there is lost in an extractor of a few layers. If anything is, so are the
    useless nodes themselves, whose ancestors may look useless too. ``turn`` is held in each pass.
    """
    points: dict[str, list[CapturePoint]] = {}
    for point in oracle:
        node = trace.names.node_of(point) if not point.member else None
        if node is not None:
            points.setdefault(node, []).append(point)
    survey = FxSurvey()
    operations = set(trace.names.operations)
    whole: dict[str, torch.Tensor] = {}

    def see(index: int, value: torch.Tensor) -> None:
        node = trace.names.eval[index]
        survey.shapes[node] = (value.dtype, tuple(value.shape))
        for point in points.get(node, ()):
            survey.equal[point] = same(value, oracle[point])
            if not survey.equal[point] and node not in operations:
                survey.astray = survey.astray or point.path
        if trace.pruned is not None:
            whole[node] = value.clone()

    def compare(index: int, value: torch.Tensor) -> None:
        node = trace.useful[index]
        if not same(value, whole[node]):
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
    name: str, child: nn.Module, x: torch.Tensor, oracle: Mapping[CapturePoint, torch.Tensor]
) -> tuple[torch.Tensor, str]:
    expected = oracle.get(CapturePoint(PointKind.MODULE, name))
    if expected is None:
        return x, f"child {name!r} does not run in the forward pass, or returns no tensor"
    try:
        y = child(x)
    except Exception:  # noqa: BLE001 - whatever a model raises, the walk ends here
        y = None
    if isinstance(y, torch.Tensor) and same(plain(y), expected):
        return y, ""
    return x, f"the forward pass does not feed child {name!r} with the child registered before it"
