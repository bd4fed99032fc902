"""Measuring a catalogue: a few forward passes, watched, and a symbolic trace."""

from __future__ import annotations

import inspect
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from layertap.errors import ModelLoadError
from layertap.extraction.attention import FUSED, TOO_LARGE, WEIGHTS, returns_weights
from layertap.extraction.catalogue import REAL_EXTRACTORS, Catalogue, LayerEntry, Support
from layertap.extraction.grid import survey_grids
from layertap.extraction.layout import Geometry
from layertap.extraction.names import LayerNames
from layertap.extraction.obstacles import LOOKS, RANDOM, calls_function, takes_step
from layertap.extraction.own_words import own_words
from layertap.extraction.passes import KeptState, PassGuard, PassRules, survey_passes
from layertap.extraction.points import CapturePoint, Dim, PointKind, ValueSpec
from layertap.extraction.samples import bytes_input, reaching_inputs
from layertap.extraction.script_taps import programs
from layertap.extraction.straight import straight_children
from layertap.extraction.survey import (
    HookSurvey,
    LooksSurvey,
    Shape,
    sample_input,
    survey_first_item,
    survey_fused,
    survey_fx,
    survey_hooks,
    survey_looks,
    survey_repeat,
    survey_walk,
    wide_input,
)
from layertap.extraction.symbolic import GraphNames, Trace, trace
from layertap.models import LoadedModel
from layertap.selection import Capture, Extractor

__all__ = ["measure", "measure_with_graph"]

_UNORDERED = (
    "the module runs several times in threads of the model's own, in an order that nothing settles"
)

_log = logging.getLogger(__name__)

_MAX_NAMED = 5
"""Layers that a note names."""


@dataclass
class _Graph:
    """What the symbolic graph is good for; `reason` says why, where it is good for nothing."""

    names: GraphNames | None = None
    reason: str = ""
    equal: Mapping[CapturePoint, bool] = field(default_factory=dict)
    specs: Mapping[str, ValueSpec] = field(default_factory=dict)
    lost: Collection[str] = ()
    astray: str = ""
    trace: Trace | None = None

    def shapes(self, guard: PassGuard, x: torch.Tensor) -> dict[CapturePoint, tuple[int, ...]]:
        """Return the shape of every node that calls no module, for a batch."""
        if self.trace is None:
            return {}
        shapes = survey_fx(self.trace, x, {}, guard).shapes
        return {_node(name): shape for name, (_, shape) in shapes.items() if name in self.specs}


@dataclass
class _Findings:
    """Everything that was measured of one model."""

    model: LoadedModel
    specs: dict[CapturePoint, ValueSpec]
    walk: dict[str, str]
    graph: _Graph
    looks: LooksSurvey
    random: Collection[CapturePoint]
    order: list[tuple[str, int]]
    varying: Collection[str]
    sometimes: Collection[CapturePoint]
    names: LayerNames
    unsendable: Mapping[CapturePoint, str]
    threaded: Collection[str]
    rules: PassRules

    @property
    def untraceable(self) -> str:
        """Why the model can't be traced under its taps; empty where it may be."""
        if self.model.takes_list:
            return "the model takes a list of images, not a tensor"
        if isinstance(self.model.module, torch.jit.ScriptModule):
            return "the model is a TorchScript program already, and runs as one under HOOK"
        inner = next(iter(programs(self.model.module)), "")
        if inner:
            return f"a part of the model, {inner!r}, is a TorchScript program already"
        if self.model.differentiates:
            return "the model differentiates in its forward pass, which a trace does not record"
        return self.rules.uncompiled

    @property
    def unwalked(self) -> str:
        """Why only the model's own ``forward`` may run its modules; empty where others may."""
        if self.rules.state is KeptState.KEPT:
            return "the model is stateful, so its own forward pass must run to its end"
        if not self.rules.early_stop:
            return "the model's passes must run to their end"
        return ""


def measure(model: LoadedModel, guard: PassGuard | None = None) -> Catalogue:
    """Return the catalogue that ``measure_with_graph`` does."""
    return measure_with_graph(model, guard)[0]


def measure_with_graph(
    model: LoadedModel, guard: PassGuard | None = None
) -> tuple[Catalogue, Trace | None]:
    """Run a model, as it was loaded, and write down its layers and the rules for its passes.

    No other forward pass of it may run meanwhile.

    Args:
        model: The model.
        guard: What kept it as it was loaded, where it has run before; a new one if not given.

    Returns:
        The catalogue, whose claims are not tried yet (see ``claims``), and the symbolic graph if
        there is one.

    Raises:
        ModelLoadError: Where the model can't run on the input that it claims to take.
    """
    guard = guard or PassGuard(model.module)
    one, two = _run_twice(model, guard)
    oracle = one.values
    x = sample_input(model, 1, model.input.item_shape)
    with guard:
        looks = survey_looks(model, x)
    others = _survey_others(model, guard) if looks.looked else []
    straight = straight_children(model.module, looks)
    with guard:
        walk = survey_walk(model, x, oracle, straight)
    graph = _survey_graph(model, oracle, guard)
    specs = {**_sometimes(model, one, others), **_specs(one, two.shapes)}
    with guard:
        specs = _in_order(model, specs, oracle, x)
    specs, graph = _placed(model, specs, graph, guard)
    with guard:
        # Other input and other sizes may have led to code that writes state.
        guard.learn(model.name)
    findings = _Findings(
        model=model,
        specs=specs,
        walk=walk,
        graph=graph,
        looks=looks,
        random=_random(model, [one, two, *others], x, guard),
        order=_order([one, *others]),
        varying=_varying([one, *others]),
        sometimes=_not_always([one, *others]),
        names=LayerNames(model.module),
        unsendable=_unsendable([one, *others]),
        threaded=one.threaded | two.threaded,
        rules=guard.rules,
    )
    entries = {entry.name: entry for entry in _module_entries(findings)}
    for entry in _weightless_entries(findings, x, guard):
        entries.setdefault(entry.name, entry)
    for entry in _node_entries(findings):
        entries.setdefault(entry.name, entry)
    for entry in _silent_entries(findings):
        entries.setdefault(entry.name, entry)
    catalogue = Catalogue(
        entries,
        findings.graph.names,
        mutates_input=one.mutated_input,
        guard=guard,
        non_finite=_first_non_finite(entries, oracle),
        notes=tuple(_notes(findings, entries)),
    )
    return catalogue, findings.graph.trace


def _survey_others(model: LoadedModel, guard: PassGuard) -> list[HookSurvey]:
    """Run a model that looks at values on other input, for which other modules may run."""
    shape = model.input.item_shape
    surveys = []
    for x in (
        wide_input(model, 1, shape),
        bytes_input(model, shape),
        *reaching_inputs(model, shape),
    ):
        if x is not None:
            # A model need not take such input; what it raises is its own business.
            with suppress(Exception), guard:
                surveys.append(survey_hooks(model, x))
    return surveys


def _order(surveys: Sequence[HookSurvey]) -> list[tuple[str, int]]:
    """Return the calls of every survey, those of the first one first."""
    return list(dict.fromkeys(call for survey in surveys for call in survey.order))


def _sometimes(
    model: LoadedModel, one: HookSurvey, others: Sequence[HookSurvey]
) -> dict[CapturePoint, ValueSpec]:
    """Return what was captured on other input only; its shape can't be promised.

    A model that takes a list of images passes on lists with a member for each image. The members
    that a larger batch has besides are left out, as other batches don't have them.
    """
    measured = {(p.path, p.capture, p.call) for p in one.shapes} if model.takes_list else set()
    return {
        point: ValueSpec(dtype, tuple(Dim(size) for size in shape), dynamic=True)
        for survey in others
        for point, (dtype, shape) in survey.shapes.items()
        if point not in one.shapes and (point.path, point.capture, point.call) not in measured
    }


def _unsendable(surveys: Sequence[HookSurvey]) -> dict[CapturePoint, str]:
    """Return why nothing can be sent of some values, for each such value of some survey."""
    return {point: reason for survey in surveys for point, reason in survey.unsendable.items()}


def _varying(surveys: Sequence[HookSurvey]) -> set[str]:
    """Return the modules that ran in some of the surveys only."""
    ran = [{path for path, _ in survey.order} for survey in surveys]
    always = set(ran[0]).intersection(*ran[1:])
    return set(ran[0]).union(*ran[1:]) - always


def _not_always(surveys: Sequence[HookSurvey]) -> set[CapturePoint]:
    """Return the points that were there in some of the surveys only."""
    always = set(surveys[0].shapes).intersection(*(survey.shapes for survey in surveys[1:]))
    return set(surveys[0].shapes).union(*(survey.shapes for survey in surveys[1:])) - always


def _random(
    model: LoadedModel, surveys: Sequence[HookSurvey], x: torch.Tensor, guard: PassGuard
) -> set[CapturePoint]:
    """Return the points whose values depend on chance, for some input at least.

    The first survey is that of ``x``. A stateful model gives other values too, without any chance.
    """
    found: set[CapturePoint] = set().union(*(survey.random for survey in surveys))
    if guard.rules.state is not KeptState.KEPT:
        with guard:
            found |= survey_repeat(model, x, surveys[0].values)
    return found


def _notes(findings: _Findings, entries: Mapping[str, LayerEntry]) -> Iterator[str]:
    ungiven = _ungiven_arguments(findings.model.module)
    if ungiven:
        yield (
            f"only the first argument of its forward is given; these keep their defaults: "
            f"{', '.join(ungiven)}"
        )
    looked = _first(entries, findings.looks.looked)
    if looked:
        yield (
            f"its forward looks at values of its input before layer {looked!r}, so other input may "
            f"take another way from there on"
        )
    varying = sorted(findings.varying)
    if varying:
        more = f" and {len(varying) - _MAX_NAMED} more" if len(varying) > _MAX_NAMED else ""
        yield (
            f"some layers run for some inputs only, and a request for one that does not run fails: "
            f"{', '.join(map(repr, varying[:_MAX_NAMED]))}{more}"
        )
    random = _first(entries, findings.random)
    if random:
        yield (
            f"its forward draws random numbers, so two requests with the same input differ, from "
            f"layer {random!r} on"
        )


def _first(entries: Mapping[str, LayerEntry], points: Collection[CapturePoint]) -> str:
    """Return the first layer whose output is one of the points; empty for none."""
    names = (n for n, entry in entries.items() if entry.points.get(Capture.OUTPUT) in points)
    return next(names, "")


def _ungiven_arguments(module: nn.Module) -> list[str]:
    """Return the names of the arguments that a call with one tensor leaves out."""
    if isinstance(module, torch.jit.ScriptModule):
        method: Any = module.forward
        return [argument.name for argument in method.schema.arguments[2:]]
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # Some callables have no signature.
        return []
    _, *others = [
        p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ] or [""]
    return others


def _first_non_finite(
    entries: Mapping[str, LayerEntry], values: Mapping[CapturePoint, torch.Tensor]
) -> str:
    """Return the first layer whose output has NaN or infinity; empty where there is none.

    Values are kept in the order in which the calls ended, so it is the innermost one.
    """
    names = {entry.points.get(Capture.OUTPUT): name for name, entry in entries.items()}
    bad = (point for point, value in values.items() if not value.isfinite().all())
    return next((names[point] for point in bad if point in names), "")


def _run_twice(model: LoadedModel, guard: PassGuard) -> tuple[HookSurvey, HookSurvey]:
    shape = model.input.item_shape
    try:
        return survey_passes(model, guard)
    except Exception as error:
        raise ModelLoadError(
            f"model {model.name!r} fails on random input of item shape {list(shape)}, "
            f"{model.input.dtype}: {type(error).__name__}: {error}"
        ) from error


def _specs(one: HookSurvey, two: Mapping[CapturePoint, Shape]) -> dict[CapturePoint, ValueSpec]:
    return {
        point: replace(
            ValueSpec.from_batches(dtype, shape, two[point][1] if point in two else None),
            quantized=one.quantized.get(point, ""),
        )
        for point, (dtype, shape) in one.shapes.items()
    }


def _survey_graph(
    model: LoadedModel, oracle: Mapping[CapturePoint, torch.Tensor], guard: PassGuard
) -> _Graph:
    shape = model.input.item_shape
    if isinstance(model.module, torch.jit.ScriptModule):
        return _Graph(reason="a TorchScript program can't be traced symbolically")
    if own := _own_modes(model.module):
        return _Graph(
            reason=f"symbolic tracing calls train() and eval(), of which {own} has its own, which "
            "may change the model"
        )
    if reason := _beside_forward(model.module):
        return _Graph(reason=reason)
    try:
        graph = trace(model)
        one = survey_fx(graph, sample_input(model, 1, shape), oracle, guard)
        two = survey_fx(graph, sample_input(model, 2, shape), {}, guard).shapes
    except Exception as error:  # noqa: BLE001 - tracing runs model code, which may raise anything
        _log.info("model %s can't be traced symbolically", model.name, exc_info=True)
        return _Graph(reason=f"the model can't be traced symbolically: {own_words(error)}")
    specs = {
        name: ValueSpec.from_batches(dtype, shape, two[name][1] if name in two else None)
        for name, (dtype, shape) in one.shapes.items()
        if name in graph.names.operations
    }
    return _Graph(graph.names, "", one.equal, specs, one.lost, one.astray, graph)


def _in_order(
    model: LoadedModel,
    specs: dict[CapturePoint, ValueSpec],
    values: Mapping[CapturePoint, torch.Tensor],
    x: torch.Tensor,
) -> dict[CapturePoint, ValueSpec]:
    """Return the specs with those marked whose items are interleaved along the batch dimension.

    Args:
        model: The model.
        specs: The type and shape of each point.
        values: The outputs for a batch of one item.
        x: That batch.
    """
    several = {p: spec for p, spec in specs.items() if (spec.batch_axis or (0, 1))[1] > 1}
    if not several:
        return specs
    other = sample_input(model, 2, model.input.item_shape)[1:]
    first = survey_first_item(model, torch.cat([x, other]), several, values)
    return {
        point: replace(spec, interleaved=True) if point in several and point not in first else spec
        for point, spec in specs.items()
    }


def _node(name: str) -> CapturePoint:
    return CapturePoint(PointKind.NODE, name)


def _placed(
    model: LoadedModel, specs: dict[CapturePoint, ValueSpec], graph: _Graph, guard: PassGuard
) -> tuple[dict[CapturePoint, ValueSpec], _Graph]:
    """Return the specs of modules and nodes with what is known of their layouts."""
    nodes = {_node(name): spec for name, spec in graph.specs.items()}
    found = survey_grids(model, {**specs, **nodes}, guard, partial(graph.shapes, guard))

    def placed(point: CapturePoint, spec: ValueSpec) -> ValueSpec:
        return replace(spec, geometry=found[point]) if point in found else spec

    return (
        {point: placed(point, spec) for point, spec in specs.items()},
        replace(graph, specs={p.path: placed(p, spec) for p, spec in nodes.items()}),
    )


def _own_modes(module: nn.Module) -> str:
    """Return the class of a submodule that has a train() or eval() of its own; else nothing.

    LoRA layers merge their weights there, say. torch's own classes are known to do no such thing.
    """
    for part in module.modules():
        kind = type(part)
        if kind.__module__.startswith("torch."):
            continue
        if kind.train is not nn.Module.train or kind.eval is not nn.Module.eval:
            return kind.__name__
    return ""


def _beside_forward(module: nn.Module) -> str:
    """Return what a call of the model does besides its forward, which alone can be traced."""
    if type(module).__call__ is not nn.Module.__call__:
        return "the model has its own __call__, and symbolic tracing sees its forward only"
    if module._forward_pre_hooks or module._forward_hooks:
        return "the model has hooks of its own, and symbolic tracing sees its forward only"
    return ""


def _module_entries(findings: _Findings) -> list[LayerEntry]:
    modules = dict(findings.model.module.named_modules())
    calls = Counter(path for path, _ in findings.order)
    by_call: dict[tuple[str, int], list[CapturePoint]] = {}
    for point in findings.specs:
        by_call.setdefault((point.path, point.call), []).append(point)
    # The model's own call began first, and its result comes last. Of one that calls itself, the
    # outermost call ends last.
    order = [(path, call) for path, call in findings.order if path]
    entries: list[LayerEntry] = []
    for path, call in (*order, ("", calls[""] - 1)):
        bare = LayerEntry(
            findings.names.of_call(path, call)[0],
            PointKind.MODULE,
            _class_name(modules[path]),
            calls[path],
            support=dict.fromkeys(REAL_EXTRACTORS, _no_tensor(path, call, findings)),
            is_result=not path,
        )
        members: dict[tuple[str, ...], dict[Capture, CapturePoint]] = {}
        for point in by_call.get((path, call), ()):
            if path or point.capture is Capture.OUTPUT:
                members.setdefault(point.member, {})[point.capture] = point
        members.setdefault((), {})
        # What can be asked for comes first: members of the output, then the container.
        for way, points in sorted(members.items(), key=lambda each: Capture.OUTPUT not in each[1]):
            entries.extend(_named(replace(bare, points=points), path, call, way, findings))
    return entries


def _named(
    entry: LayerEntry, path: str, call: int, way: tuple[str, ...], findings: _Findings
) -> Iterator[LayerEntry]:
    """Yield a layer by each of its names; see Note [Names]."""
    calls = findings.names.of_call(path, call)
    own, *others = (findings.names.of_member(each, way) for each in calls)
    described = _describe(replace(entry, name=own), findings)
    yield described
    for other in others:
        yield replace(described, name=other, same_as=own)


def _describe(entry: LayerEntry, findings: _Findings) -> LayerEntry:
    if not entry.points:
        return entry
    specs = {side: findings.specs[point] for side, point in entry.points.items()}
    output = specs.get(Capture.OUTPUT)
    return replace(
        entry,
        specs=specs,
        geometry=output.geometry if output else Geometry(),
        support={extractor: _support(extractor, entry, findings) for extractor in REAL_EXTRACTORS},
    )


def _support(extractor: Extractor, entry: LayerEntry, findings: _Findings) -> Support:
    point = entry.points.get(Capture.OUTPUT)
    if extractor is Extractor.TORCHSCRIPT and findings.untraceable:
        return Support(output=False, reason=findings.untraceable)
    if findings.unwalked and extractor not in (Extractor.HOOK, Extractor.TORCHSCRIPT):
        return Support(output=False, reason=findings.unwalked)
    if point is None:
        missing = next(iter(entry.points.values()))
        support = _no_tensor(missing.path, missing.call, findings)
    elif point in findings.unsendable:
        support = Support(output=False, reason=findings.unsendable[point])
    elif point.path in findings.threaded and entry.calls > 1:
        support = Support(output=False, reason=_UNORDERED)
    elif extractor is Extractor.FX:
        support = _fx_support(point, findings.graph)
    elif extractor in (Extractor.CHILDREN, Extractor.LAYER_GETTER):
        support = _walk_support(point, findings)
    else:
        support = Support(output=True)
    given = entry.points.get(Capture.INPUT)
    hooked = extractor in (Extractor.HOOK, Extractor.TORCHSCRIPT)
    sent = given is not None and given not in findings.unsendable
    if given is not None and given.path in findings.threaded and entry.calls > 1:
        sent = False
    support = replace(support, input=hooked and sent)
    return support.without(
        _obstacle(extractor, point, findings), _obstacle(extractor, given, findings)
    )


def _obstacle(extractor: Extractor, point: CapturePoint | None, findings: _Findings) -> str:
    """Return why an extractor would be wrong about a point for inputs unlike the sample."""
    if point is None or extractor is Extractor.HOOK:
        return ""
    if point in findings.random:
        return RANDOM
    if point.path in findings.varying:
        return "the module runs for some inputs only"
    if point in findings.sometimes:
        return "the layer has that value for some inputs only"
    return _uncompilable(point, findings.looks) if extractor is Extractor.TORCHSCRIPT else ""


def _uncompilable(point: CapturePoint, looks: LooksSurvey) -> str:
    if point in looks.looked:
        return LOOKS
    if point in looks.functions:
        return calls_function(looks.functions[point])
    return takes_step(looks.steps[point]) if point in looks.steps else ""


def _walk_support(point: CapturePoint, findings: _Findings) -> Support:
    reasons = findings.walk
    if not point.path:
        reason = "a walk over children has the children's values, not the model's own result"
    elif point.member:
        reason = "a walk over children passes on plain tensors only"
    elif point.call:
        reason = "a walk over children calls each child once"
    elif point.path not in reasons:
        reason = f"{point.path!r} is not a top-level child of the model"
    elif point in findings.looks.looked and not reasons[point.path]:
        reason = (
            "before it the model branches on tensor values, so calling its children in order may "
            "give another result"
        )
    else:
        reason = reasons[point.path]
    return Support(output=not reason, reason=reason)


def _fx_support(point: CapturePoint, graph: _Graph) -> Support:
    if graph.names is None:
        reason = graph.reason
    elif point not in graph.equal:
        reason = "the symbolic graph has no node for it"
    elif not graph.equal[point]:
        reason = "the symbolic graph's value differs from the model's"
    else:
        reason = ""
    return Support(output=not reason, reason=reason)


def _no_tensor(path: str, call: int, findings: _Findings) -> Support:
    what = "layer" if path else "model"
    inside = _first_member(path, call, findings)
    advice = f"; ask for a member of it, such as {inside}" if inside else ""
    return Support(output=False, reason=f"the {what} returns no plain tensor{advice}")


def _first_member(path: str, call: int, findings: _Findings) -> str:
    """Return the name of the first tensor in a container that a call returned; empty for none."""
    base = findings.names.of_call(path, call)[0]
    return next(
        (
            findings.names.of_member(base, point.member)
            for point in findings.specs
            if (point.path, point.call, point.capture) == (path, call, Capture.OUTPUT)
            and point.member
        ),
        "",
    )


def _weightless_entries(
    findings: _Findings, x: torch.Tensor, guard: PassGuard
) -> Iterator[LayerEntry]:
    """Yield a layer for the attention weights of each module that can't be made to return them."""
    modules = dict(findings.model.module.named_modules())
    # Not worth a pass where nothing is called so.
    if not any("att" in f"{path}.{_class_name(each)}".lower() for path, each in modules.items()):
        return
    calls = Counter(path for path, _ in findings.order)
    with guard:
        fused = survey_fused(findings.model, x)
    for path in sorted(fused):
        reason = TOO_LARGE if returns_weights(modules[path]) else FUSED
        name = findings.names.of_member(findings.names.of_call(path, 0)[0], (WEIGHTS,))
        yield LayerEntry(
            name,
            PointKind.MODULE,
            _class_name(modules[path]),
            calls[path],
            support=dict.fromkeys(REAL_EXTRACTORS, Support(output=False, reason=reason)),
        )


def _node_entries(findings: _Findings) -> list[LayerEntry]:
    graph = findings.graph
    unwalked = Support(output=False, reason=findings.unwalked)
    no = Support(output=False, reason="it is a node of the symbolic graph, not a module")
    lost = Support(output=False, reason="dead-code elimination drops statements that it depends on")

    astray = Support(
        output=False,
        reason=f"the symbolic graph computes something else than the model: the value of "
        f"{graph.astray!r} differs",
    )

    def support(name: str) -> dict[Extractor, Support]:
        own = (
            unwalked
            if unwalked.reason
            else lost
            if name in graph.lost
            else astray
            if graph.astray
            else Support(output=True)
        )
        return {**dict.fromkeys(REAL_EXTRACTORS, no), Extractor.FX: own}

    return [
        LayerEntry(
            name,
            PointKind.NODE,
            re.sub(r"_\d+$", "", name.rsplit(".", 1)[-1]),
            1,
            points={Capture.OUTPUT: _node(name)},
            specs={Capture.OUTPUT: spec},
            geometry=spec.geometry,
            support=support(name),
        )
        for name, spec in graph.specs.items()
    ]


def _silent_entries(findings: _Findings) -> Iterator[LayerEntry]:
    ran = {path for path, _ in findings.order}
    reason = "the module never runs in a forward pass"
    if findings.looks.looked:
        reason = (
            "the module never runs in a forward pass on sample input; as the model branches on "
            "tensor values, it may run for other input"
        )
    no = Support(output=False, reason=reason)
    for path, module in findings.model.module.named_modules():
        if not path or path in ran:
            continue
        for name in findings.names.of_call(path, 0):
            yield LayerEntry(
                name,
                PointKind.MODULE,
                _class_name(module),
                0,
                support=dict.fromkeys(REAL_EXTRACTORS, no),
                same_as="" if name == path else path,
            )


def _class_name(module: nn.Module) -> str:
    # A TorchScript module is a RecursiveScriptModule that remembers what it was made from.
    return str(getattr(module, "original_name", type(module).__name__))
