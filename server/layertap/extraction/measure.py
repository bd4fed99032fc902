"""Measures a model's catalogue with a few watched forward passes and a symbolic trace."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from layertap.errors import ModelLoadError
from layertap.extraction.catalogue import Catalogue, LayerEntry
from layertap.extraction.entries import layer_entries
from layertap.extraction.grid import survey_grids
from layertap.extraction.kept_values import KeptValue
from layertap.extraction.measurement import MeasuredGraph, Measurement
from layertap.extraction.names import LayerNames
from layertap.extraction.notes import notes_of
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
    survey_fx,
    survey_hooks,
    survey_looks,
    survey_repeat,
    survey_walk,
)
from layertap.extraction.symbolic import Trace, trace
from layertap.extraction.towers import placed_in_towers, survey_towers
from layertap.models import Batch, LoadedModel, Signature, Tower
from layertap.selection import Capture

__all__ = ["measure", "measure_with_graph"]

_log = logging.getLogger(__name__)


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
        unsendable=_unsendable([one, *others], graph),
        threaded=one.threaded | two.threaded,
        rules=scope.rules,
    )
    entries = layer_entries(findings, x, scope)
    catalogue = Catalogue(
        entries,
        findings.graph.names,
        key=model.signature.key,
        mutates_input=one.mutated_input,
        scope=scope,
        non_finite=_first_non_finite(entries, reference),
        notes=tuple(notes_of(findings, entries)),
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


def _unsendable(surveys: Sequence[HookSurvey], graph: MeasuredGraph) -> dict[CapturePoint, str]:
    """Return, for each value that can't be sent in some survey or in the graph, why."""
    nodes = {CapturePoint(PointKind.NODE, name): why for name, why in graph.unsendable.items()}
    return nodes | {point: why for survey in surveys for point, why in survey.unsendable.items()}


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
    return MeasuredGraph(
        graph.names, "", one.equal, specs, one.lost, one.astray, one.unsendable, graph
    )


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


def _placed(
    model: LoadedModel, specs: dict[CapturePoint, ValueSpec], graph: MeasuredGraph, scope: PassScope
) -> tuple[dict[CapturePoint, ValueSpec], MeasuredGraph]:
    """Return the specs of modules and of nodes, with what is known about their layouts."""
    nodes = {CapturePoint(PointKind.NODE, name): spec for name, spec in graph.specs.items()}
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
    nodes = {CapturePoint(PointKind.NODE, name): spec for name, spec in graph.specs.items()}
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
