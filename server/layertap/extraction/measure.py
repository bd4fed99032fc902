"""Measures a model's catalogue with a few watched forward passes and a symbolic trace."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from layertap.errors import ModelLoadError
from layertap.extraction.attention import FUSED, TOO_LARGE, WEIGHTS, returns_weights
from layertap.extraction.catalogue import Catalogue, LayerEntry, Support
from layertap.extraction.grid import survey_grids
from layertap.extraction.kept_values import KeptValue
from layertap.extraction.kinds.base import CompiledKind, Verdict
from layertap.extraction.kinds.registry import KINDS, REFERENCE, AnyKind
from layertap.extraction.layout import Geometry
from layertap.extraction.measurement import MeasuredGraph, Measurement
from layertap.extraction.names import LayerNames
from layertap.extraction.own_words import own_words
from layertap.extraction.passes import KeptState, PassScope, survey_passes
from layertap.extraction.points import CapturePoint, Dim, PointKind, ValueSpec
from layertap.extraction.samples import (
    bytes_batch,
    ordinary_batch,
    reaching_batches,
    wide_batch,
)
from layertap.extraction.sizes import survey_sizes
from layertap.extraction.straight import straight_children
from layertap.extraction.survey import (
    HookSurvey,
    Shape,
    survey_first_item,
    survey_fused,
    survey_fx,
    survey_hooks,
    survey_looks,
    survey_repeat,
    survey_walk,
)
from layertap.extraction.symbolic import Trace, trace
from layertap.extraction.towers import placed_in_towers, survey_towers
from layertap.listing import listed
from layertap.models import Batch, LoadedModel, Signature, Tower
from layertap.selection import SIDES, Capture, Extractor

__all__ = ["measure", "measure_with_graph"]

_UNORDERED = (
    "the module runs several times in the model's own threads, so the order of its calls is not "
    "defined"
)

_log = logging.getLogger(__name__)

_MAX_NAMED = 5
"""Layers that a note lists by name."""


def measure(model: LoadedModel, scope: PassScope | None = None) -> Catalogue:
    """Return the catalogue from ``measure_with_graph``."""
    return measure_with_graph(model, scope)[0]


def measure_with_graph(
    model: LoadedModel, scope: PassScope | None = None
) -> tuple[Catalogue, Trace | None]:
    """Run a freshly loaded model, and record its layers and the rules for its passes.

    No other forward pass of the model may run meanwhile.

    Args:
        model: The model.
        scope: The scope that has kept the loaded state, if the model has run before; else a new
            scope is made.

    Returns:
        The catalogue, whose claims are not tested yet (see ``claims``), and the symbolic graph;
        None if there is none.

    Raises:
        ModelLoadError: If the model can't run on sample input of its own signature.
    """
    scope = scope or PassScope(model.module)
    one, two = _run_twice(model, scope)
    reference = one.values
    x = ordinary_batch(model, 1)
    with scope:
        looks = survey_looks(model, x)
    others = _survey_with_optional(model, scope)
    if looks.looked:
        others += _survey_others(model, scope)
    walk: dict[str, str] = {}
    if len(model.signature.inputs) == 1:
        straight = straight_children(model.module, looks)
        with scope:
            walk = survey_walk(model, x, reference, straight)
    graph = _survey_graph(model, reference, scope)
    specs = {**_sometimes(model, one, others), **_specs(one, two.shapes)}
    with scope:
        specs = _in_order(model, specs, reference, x)
    towers = _survey_towers(model, one, scope)
    specs, graph = _placed(model, specs, graph, scope)
    specs.update(placed_in_towers(model, towers, specs, scope))
    specs, graph = _sized(model, specs, graph, scope)
    with scope:
        # The passes on other input and other sizes may have reached code that writes state.
        scope.learn(model.name)
    findings = Measurement(
        model=model,
        specs=specs,
        walk=walk,
        graph=graph,
        looks=looks,
        random=_random(model, [one, two, *others], x, scope),
        order=_order([one, *others]),
        varying=_varying([one, *others]),
        sometimes=_not_always([one, *others]),
        names=LayerNames(model.module),
        unsendable=_unsendable([one, *others]),
        threaded=one.threaded | two.threaded,
        rules=scope.rules,
    )
    entries = {entry.name: entry for entry in _module_entries(findings)}
    for entry in _weightless_entries(findings, x, scope):
        entries.setdefault(entry.name, entry)
    for entry in _node_entries(findings):
        entries.setdefault(entry.name, entry)
    for entry in _silent_entries(findings):
        entries.setdefault(entry.name, entry)
    catalogue = Catalogue(
        entries,
        findings.graph.names,
        key=model.signature.key,
        mutates_input=one.mutated_input,
        scope=scope,
        non_finite=_first_non_finite(entries, reference),
        notes=tuple(_notes(findings, entries)),
        looks=looks,
        towers=towers,
        varying=frozenset(findings.varying),
    )
    return catalogue, findings.graph.trace


def _survey_with_optional(model: LoadedModel, scope: PassScope) -> list[HookSurvey]:
    """Run a model with its optional inputs too, because other modules may run then."""
    signature = model.signature
    if signature.whole_key == signature.key:
        return []
    with scope:
        return [survey_hooks(model, ordinary_batch(model, 1, signature.whole_key))]


def _survey_towers(
    model: LoadedModel, one: HookSurvey, scope: PassScope
) -> dict[Tower, frozenset[CapturePoint]]:
    if not model.signature.towers:
        return {}
    whole_key = model.signature.whole_key
    seen = [(ordinary_batch(model, 1), one)]
    if whole_key != model.signature.key:
        whole = ordinary_batch(model, 1, whole_key)
        with scope:
            seen.append((whole, survey_hooks(model, whole, keep_values=True)))
    return survey_towers(model, seen, scope)


def _survey_others(model: LoadedModel, scope: PassScope) -> list[HookSurvey]:
    """Run a model that looks at values on other input too, which may run other modules."""
    surveys = []
    for x in (wide_batch(model, 1), bytes_batch(model), *reaching_batches(model)):
        if x is not None:
            # A model may refuse such input; its error does not matter here.
            with suppress(Exception), scope:
                surveys.append(survey_hooks(model, x))
    return surveys


def _order(surveys: Sequence[HookSurvey]) -> list[tuple[str, int]]:
    """Return the calls of all surveys without duplicates, those of the first survey first."""
    return list(dict.fromkeys(call for survey in surveys for call in survey.order))


def _sometimes(
    model: LoadedModel, one: HookSurvey, others: Sequence[HookSurvey]
) -> dict[CapturePoint, ValueSpec]:
    """Return the specs of values that exist only for other input; their shapes may vary.

    A model that takes a list of images passes on lists with one member per image. The additional
    members of a larger batch are left out, as other batches don't have them.
    """
    measured = {(p.path, p.capture, p.call) for p in one.shapes} if model.takes_list else set()
    return {
        point: ValueSpec(dtype, tuple(Dim(size) for size in shape), dynamic=True)
        for survey in others
        for point, (dtype, shape) in survey.shapes.items()
        if point not in one.shapes and (point.path, point.capture, point.call) not in measured
    }


def _unsendable(surveys: Sequence[HookSurvey]) -> dict[CapturePoint, str]:
    """Return, for each value that can't be sent in some survey, why."""
    return {point: reason for survey in surveys for point, reason in survey.unsendable.items()}


def _varying(surveys: Sequence[HookSurvey]) -> set[str]:
    """Return the modules that ran in some surveys but not in all."""
    ran = [{path for path, _ in survey.order} for survey in surveys]
    always = set(ran[0]).intersection(*ran[1:])
    return set(ran[0]).union(*ran[1:]) - always


def _not_always(surveys: Sequence[HookSurvey]) -> set[CapturePoint]:
    """Return the points that had a value in some surveys but not in all."""
    always = set(surveys[0].shapes).intersection(*(survey.shapes for survey in surveys[1:]))
    return set(surveys[0].shapes).union(*(survey.shapes for survey in surveys[1:])) - always


def _random(
    model: LoadedModel, surveys: Sequence[HookSurvey], x: Batch, scope: PassScope
) -> set[CapturePoint]:
    """Return the points whose values depend on random numbers, for some input at least.

    ``surveys[0]`` is the survey of ``x``. A stateful model gives different values without any
    random numbers, so its pass is not repeated.
    """
    found: set[CapturePoint] = set().union(*(survey.random for survey in surveys))
    if scope.rules.state is not KeptState.KEPT:
        with scope:
            found |= survey_repeat(model, x, surveys[0].values)
    return found


def _notes(findings: Measurement, entries: Mapping[str, LayerEntry]) -> Iterator[str]:
    ungiven = _ungiven_arguments(findings.model)
    if ungiven:
        yield (
            f"these arguments of its forward are never given and keep their defaults: "
            f"{', '.join(ungiven)}"
        )
    if findings.model.signature.towers:
        alone = (
            " and ".join(map(repr, findings.model.signature.of_tower(tower).key.names))
            for tower in findings.model.signature.towers
        )
        yield (
            f"a request with only {', or only '.join(alone)} runs only the layers that depend on "
            f"it; a request for others needs the other inputs too"
        )
    looked = _first(entries, findings.looks.looked)
    if looked:
        yield (
            f"its forward branches on values of its input before layer {looked!r}, so other input "
            f"may take another branch there; {_branches(findings)}"
        )
    varying = sorted(findings.varying)
    if varying:
        yield (
            f"some layers run only for some inputs, and a request for one that does not run fails: "
            f"{listed(map(repr, varying), _MAX_NAMED)}"
        )
    random = _first(entries, findings.random)
    if random:
        yield (
            f"its forward draws random numbers, so from layer {random!r} on, two requests with the "
            f"same input give different values"
        )


def _branches(findings: Measurement) -> str:
    """Say how layers after a branch are served."""
    compiled = " and ".join(
        kind.name
        for kind in KINDS.values()
        if isinstance(kind, CompiledKind) and kind.automatic and kind.follows_branches
    )
    if findings.looks.looked.keys() <= findings.looks.unguarded.keys():
        return f"{compiled} serves no layer from there on"
    return (
        f"{compiled} serves layers from there on by one compiled plan for each way that the code "
        f"can go, and {REFERENCE.name} serves the ways that have no plan"
    )


def _first(entries: Mapping[str, LayerEntry], points: Collection[CapturePoint]) -> str:
    """Return the first layer whose output is one of the points; empty for none."""
    names = (n for n, entry in entries.items() if entry.points.get(Capture.OUTPUT) in points)
    return next(names, "")


def _ungiven_arguments(model: LoadedModel) -> list[str]:
    """Return the names of the arguments of ``forward`` to which no input belongs."""
    if model.arguments.adapter is not None:
        return []
    given = {spec.name.split(".")[0] for spec in model.signature.inputs}
    ungiven = [p.name for p in model.arguments.parameters if p.name not in given and not p.rest]
    # A single input may have another name than its parameter.
    unnamed = len(given) == 1 and len(ungiven) == len(model.arguments.parameters)
    return ungiven[1:] if unnamed else ungiven


def _first_non_finite(
    entries: Mapping[str, LayerEntry], values: Mapping[CapturePoint, KeptValue]
) -> str:
    """Return the first layer whose output has NaN or infinity; empty if there is none.

    Values are in the order in which the calls ended, so this is the innermost such layer.
    """
    names = {entry.points.get(Capture.OUTPUT): name for name, entry in entries.items()}
    bad = (point for point, value in values.items() if not value.finite)
    return next((names[point] for point in bad if point in names), "")


def _run_twice(model: LoadedModel, scope: PassScope) -> tuple[HookSurvey, HookSurvey]:
    try:
        return survey_passes(model, scope)
    except Exception as error:
        raise ModelLoadError(
            f"model {model.name!r} fails on random input of {model.signature.key}: "
            f"{type(error).__name__}: {error}"
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
    model: LoadedModel, reference: Mapping[CapturePoint, KeptValue], scope: PassScope
) -> MeasuredGraph:
    if isinstance(model.module, torch.jit.ScriptModule):
        return MeasuredGraph(reason="a TorchScript program can't be traced symbolically")
    if own := _own_modes(model.module):
        return MeasuredGraph(
            reason=f"symbolic tracing calls train() and eval(), but {own} overrides them, which "
            "may change the model"
        )
    if reason := _left_out(model.signature) or _beside_forward(model.module):
        return MeasuredGraph(reason=reason)
    try:
        graph = trace(model)
        one = survey_fx(graph, ordinary_batch(model, 1), reference, scope)
        two = survey_fx(graph, ordinary_batch(model, 2), {}, scope).shapes
    except Exception as error:  # noqa: BLE001 - tracing runs model code, which may raise anything
        _log.info("model %s can't be traced symbolically", model.name, exc_info=True)
        return MeasuredGraph(reason=f"the model can't be traced symbolically: {own_words(error)}")
    specs = {
        name: ValueSpec.from_batches(dtype, shape, two[name][1] if name in two else None)
        for name, (dtype, shape) in one.shapes.items()
        if name in graph.names.operations
    }
    return MeasuredGraph(graph.names, "", one.equal, specs, one.lost, one.astray, graph)


def _left_out(signature: Signature) -> str:
    """Return why a graph can't follow the inputs that a request leaves out; else empty."""
    if signature.towers:
        return (
            "parts of the model run alone where a request has only their inputs, and symbolic "
            "tracing sees only the whole"
        )
    if signature.whole_key != signature.key:
        return (
            "the model has optional inputs, and symbolic tracing can't distinguish one that is "
            "left out from one that is given"
        )
    return ""


def _in_order(
    model: LoadedModel,
    specs: dict[CapturePoint, ValueSpec],
    values: Mapping[CapturePoint, KeptValue],
    x: Batch,
) -> dict[CapturePoint, ValueSpec]:
    """Return the specs, with a mark on points whose items are interleaved along the batch axis.

    Args:
        model: The model.
        specs: The dtype and shape of each point.
        values: The outputs for a batch of one item.
        x: That batch.
    """
    several = {p: spec for p, spec in specs.items() if (spec.batch_axis or (0, 1))[1] > 1}
    if not several:
        return specs
    other = ordinary_batch(model, 2).narrow(1, 1)
    first = survey_first_item(model, Batch.cat([x, other]), several, values)
    return {
        point: replace(spec, interleaved=True) if point in several and point not in first else spec
        for point, spec in specs.items()
    }


def _node(name: str) -> CapturePoint:
    return CapturePoint(PointKind.NODE, name)


def _placed(
    model: LoadedModel, specs: dict[CapturePoint, ValueSpec], graph: MeasuredGraph, scope: PassScope
) -> tuple[dict[CapturePoint, ValueSpec], MeasuredGraph]:
    """Return the specs of modules and of nodes, with what is known about their layouts."""
    nodes = {_node(name): spec for name, spec in graph.specs.items()}
    found = survey_grids(model, {**specs, **nodes}, scope, partial(graph.shapes, scope))

    def placed(point: CapturePoint, spec: ValueSpec) -> ValueSpec:
        return replace(spec, geometry=found[point]) if point in found else spec

    return (
        {point: placed(point, spec) for point, spec in specs.items()},
        replace(graph, specs={p.path: placed(p, spec) for p, spec in nodes.items()}),
    )


def _sized(
    model: LoadedModel, specs: dict[CapturePoint, ValueSpec], graph: MeasuredGraph, scope: PassScope
) -> tuple[dict[CapturePoint, ValueSpec], MeasuredGraph]:
    """Return the specs of modules and nodes with how their sizes follow those of the inputs."""
    if model.takes_list or scope.rules.state is KeptState.KEPT:
        # The sizes of a list's members are not those of the activations, and each pass of a
        # stateful model may change the next one.
        return specs, graph
    nodes = {_node(name): spec for name, spec in graph.specs.items()}
    both = {**specs, **nodes}
    found = survey_sizes(model, model.signature.key, both, scope, partial(graph.shapes, scope))

    def sized(point: CapturePoint, spec: ValueSpec) -> ValueSpec:
        return spec.following(found[point]) if point in found else spec

    return (
        {point: sized(point, spec) for point, spec in specs.items()},
        replace(graph, specs={p.path: sized(p, spec) for p, spec in nodes.items()}),
    )


def _own_modes(module: nn.Module) -> str:
    """Return the class of a submodule that overrides train() or eval(); empty if there is none.

    LoRA layers merge their weights there, for example. torch's own classes are known to be safe.
    """
    for part in module.modules():
        kind = type(part)
        if kind.__module__.startswith("torch."):
            continue
        if kind.train is not nn.Module.train or kind.eval is not nn.Module.eval:
            return kind.__name__
    return ""


def _beside_forward(module: nn.Module) -> str:
    """Return why a call of the model is more than its forward, which alone can be traced."""
    if type(module).__call__ is not nn.Module.__call__:
        return "the model has its own __call__, but symbolic tracing sees only its forward"
    if module._forward_pre_hooks or module._forward_hooks:
        return "the model has hooks of its own, but symbolic tracing sees only its forward"
    return ""


def _module_entries(findings: Measurement) -> list[LayerEntry]:
    modules = dict(findings.model.module.named_modules())
    calls = Counter(path for path, _ in findings.order)
    by_call: dict[tuple[str, int], list[CapturePoint]] = {}
    for point in findings.specs:
        by_call.setdefault((point.path, point.call), []).append(point)
    # The model's own call began first, but its result comes last. If the model calls itself, its
    # outermost call ends last.
    order = [(path, call) for path, call in findings.order if path]
    entries: list[LayerEntry] = []
    for path, call in (*order, ("", calls[""] - 1)):
        bare = LayerEntry(
            findings.names.of_call(path, call)[0],
            PointKind.MODULE,
            _class_name(modules[path]),
            calls[path],
            support=_refused(_no_tensor(path, call, Capture.OUTPUT, findings)),
            is_result=not path,
        )
        members: dict[tuple[str, ...], dict[Capture, CapturePoint]] = {}
        for point in by_call.get((path, call), ()):
            if path or point.capture is Capture.OUTPUT:
                members.setdefault(point.member, {})[point.capture] = point
        members.setdefault((), {})
        # What a client can request comes first: members of the output, then the container.
        for way, points in sorted(members.items(), key=lambda each: Capture.OUTPUT not in each[1]):
            asked_for = isinstance(modules[path], nn.MultiheadAttention) and WEIGHTS in way[-1:]
            entry = replace(bare, points=points, is_used=not asked_for)
            entries.extend(_named(entry, path, call, way, findings))
    return entries


def _named(
    entry: LayerEntry, path: str, call: int, way: tuple[str, ...], findings: Measurement
) -> Iterator[LayerEntry]:
    """Yield a layer under each of its names; see Note [Names]."""
    calls = findings.names.of_call(path, call)
    own, *others = (findings.names.of_member(each, way) for each in calls)
    described = _describe(replace(entry, name=own), findings)
    yield described
    for other in others:
        yield replace(described, name=other, same_as=own)


def _describe(entry: LayerEntry, findings: Measurement) -> LayerEntry:
    if not entry.points:
        return entry
    specs = {side: findings.specs[point] for side, point in entry.points.items()}
    output = specs.get(Capture.OUTPUT)
    return replace(
        entry,
        specs=specs,
        geometry=output.geometry if output else Geometry(),
        support=_supported(entry, findings),
    )


def _verdict(kind: AnyKind, entry: LayerEntry, side: Capture, findings: Measurement) -> Verdict:
    """Decide whether a kind serves one side of a layer that ran."""
    point = entry.points.get(side)
    if reason := kind.refuses(findings):
        return Verdict(reason)
    if side not in kind.captures:
        taken = " and ".join(f"{each}s" for each in SIDES if each in kind.captures)
        return Verdict(f"it takes {taken} only")
    if point is None:
        any_point = next(iter(entry.points.values()))
        return Verdict(_no_tensor(any_point.path, any_point.call, side, findings))
    if point in findings.unsendable:
        return Verdict(findings.unsendable[point])
    if point.path in findings.threaded and entry.calls > 1:
        return Verdict(_UNORDERED)
    return kind.claims(point, findings)


def _no_tensor(path: str, call: int, side: Capture, findings: Measurement) -> str:
    """Return why a value that is not a tensor can't be captured."""
    if side is not Capture.OUTPUT:
        return f"the layer's {side} is not a single tensor"
    what = "layer" if path else "model"
    inside = _first_member(path, call, findings)
    advice = f"; request a member of it, such as {inside}" if inside else ""
    return f"the {what} does not return a plain tensor{advice}"


def _refused(reason: str) -> dict[Extractor, Support]:
    return dict.fromkeys(KINDS, Support.refused(reason))


def _supported(entry: LayerEntry, findings: Measurement) -> dict[Extractor, Support]:
    return {
        extractor: Support({side: _verdict(kind, entry, side, findings) for side in SIDES})
        for extractor, kind in KINDS.items()
    }


def _first_member(path: str, call: int, findings: Measurement) -> str:
    """Return the name of the first tensor in the container that a call returned; else empty."""
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


def _weightless_entries(findings: Measurement, x: Batch, scope: PassScope) -> Iterator[LayerEntry]:
    """Yield a layer for the attention weights of each module that can't return them."""
    modules = dict(findings.model.module.named_modules())
    # A pass is not worth it if no name suggests attention.
    if not any("att" in f"{path}.{_class_name(each)}".lower() for path, each in modules.items()):
        return
    calls = Counter(path for path, _ in findings.order)
    with scope:
        fused = survey_fused(findings.model, x)
    for path in sorted(fused):
        reason = TOO_LARGE if returns_weights(modules[path]) else FUSED
        name = findings.names.of_member(findings.names.of_call(path, 0)[0], (WEIGHTS,))
        yield LayerEntry(
            name,
            PointKind.MODULE,
            _class_name(modules[path]),
            calls[path],
            support=_refused(reason),
        )


def _node_entries(findings: Measurement) -> Iterator[LayerEntry]:
    for name, spec in findings.graph.specs.items():
        entry = LayerEntry(
            name,
            PointKind.NODE,
            re.sub(r"_\d+$", "", name.rsplit(".", 1)[-1]),
            1,
            points={Capture.OUTPUT: _node(name)},
            specs={Capture.OUTPUT: spec},
            geometry=spec.geometry,
        )
        yield replace(entry, support=_supported(entry, findings))


def _silent_entries(findings: Measurement) -> Iterator[LayerEntry]:
    ran = {path for path, _ in findings.order}
    reason = "the module never runs in a forward pass"
    if findings.looks.looked:
        reason = (
            "the module never runs in a forward pass on sample input; as the model branches on "
            "tensor values, it may run for other input"
        )
    for path, module in findings.model.module.named_modules():
        if not path or path in ran:
            continue
        for name in findings.names.of_call(path, 0):
            yield LayerEntry(
                name,
                PointKind.MODULE,
                _class_name(module),
                0,
                support=_refused(reason),
                same_as="" if name == path else path,
            )


def _class_name(module: nn.Module) -> str:
    # A TorchScript module is a RecursiveScriptModule; this is the class that it was made from.
    return str(getattr(module, "original_name", type(module).__name__))
