"""Describes a loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from layertap.description import (
    Dimension,
    ImageDescription,
    InputDescription,
    ItemDescription,
    LayerDescription,
    ModelDescription,
    PassDescription,
    RefusedPlanDescription,
    ValueDescription,
)
from layertap.engine.host import ModelHost, RefusedPlan
from layertap.extraction.catalogue import LayerEntry, side_name
from layertap.extraction.kinds.registry import KINDS
from layertap.extraction.layout import Layout
from layertap.extraction.points import Dim, PointKind, ValueSpec
from layertap.models import InputSpec, Preprocess, Steps
from layertap.models.audio import AudioProcessor
from layertap.models.text import TextTokenizer
from layertap.selection import SIDES, Capture, Extractor

__all__ = ["describe", "summarize"]

_RefusedAlone = Mapping[tuple[Extractor, str], str]
"""Why an extractor could not serve one side of a layer by itself, by extractor and side name."""

_described: WeakKeyDictionary[ModelHost, tuple[_RefusedAlone, tuple[LayerDescription, ...]]] = (
    WeakKeyDictionary()
)
"""The layers of each model as they were described last, and the refusals that they depend on."""


def describe(host: ModelHost, *, fingerprint: bool = False) -> ModelDescription:
    """Describe a loaded model and its layers, including plans that were refused so far.

    The fingerprint is included only on request, because the first one reads all weights.

    If a plan was refused for one layer by itself, the reason is listed at that layer, too.
    """
    return replace(
        summarize(host),
        layers=_layers(host),
        refused_plans=tuple(map(_refused_plan, host.refused_plans())),
        fingerprint=host.fingerprint() if fingerprint else "",
    )


def summarize(host: ModelHost) -> ModelDescription:
    """Describe a loaded model without its layers."""
    model, rules = host.model, host.catalogue.scope.rules
    return ModelDescription(
        name=model.name,
        source=model.source,
        weights=model.weights,
        device=str(model.device),
        inputs=tuple(
            _input(
                spec,
                model.preprocess if spec.name in model.image_inputs else None,
                model.tokenizer if spec.name in model.text_inputs else None,
                model.audio if spec.name in model.audio_inputs else None,
                optional=model.signature.may_leave_out(spec),
            )
            for spec in model.signature.inputs
        ),
        layers=(),
        passes=PassDescription(
            rules.early_stop, rules.concurrent, rules.shared, rules.state.name.lower()
        ),
        notes=(
            *(*host.catalogue.notes, *rules.notes, *_of_lengths(host)),
            *(*host.sharing.notes, *host.races.notes),
        ),
        declared_layers=tuple(each.name_for(each.layer) for each in host.declared),
        variants={
            extractor: names
            for extractor, kind in KINDS.items()
            if (names := kind.variants(model.device))
        },
    )


def _of_lengths(host: ModelHost) -> tuple[str, ...]:
    return (host.lengths.note,) if host.lengths is not None else ()


def _layers(host: ModelHost) -> tuple[LayerDescription, ...]:
    """Return the layers; the same object each time, until another plan is refused."""
    refused = _refused_alone(host)
    known = _described.get(host)
    if known is None or known[0] != refused:
        known = refused, tuple(_layer(entry, host, refused) for entry in host.catalogue)
        _described[host] = known
    return known[1]


def _refused_plan(plan: RefusedPlan) -> RefusedPlanDescription:
    return RefusedPlanDescription(
        extractor=plan.extractor,
        layers=plan.layers,
        inputs=tuple(
            ItemDescription(item.name, _name(item.dtype), item.shape)
            for item in plan.batch_key.items
        ),
        reason=plan.reason,
    )


def _refused_alone(host: ModelHost) -> _RefusedAlone:
    """Return the refusals so far that concern one layer by itself, for default items."""
    return {
        (plan.extractor, plan.layers[0]): plan.reason
        for plan in host.refused_plans()
        if len(plan.layers) == 1 and plan.batch_key == host.model.signature.key
    }


def _refusal(entry: LayerEntry, extractor: Extractor, side: Capture, refused: _RefusedAlone) -> str:
    """Return why an extractor can't capture one side of a layer; empty if it can."""
    found = refused.get((extractor, side_name(entry.name, side)), "")
    return found or entry.refusal(extractor, side)


def _stride(entry: LayerEntry, host: ModelHost) -> float:
    """Return the height of the first input divided by that of a layer's grid; 0 without a grid."""
    if entry.geometry.layout is Layout.UNKNOWN:
        return 0.0
    name = host.catalogue.grid_input(entry.points[Capture.OUTPUT])
    return host.model.signature.spec(name).shape[-2] / entry.geometry.height


def _input(
    spec: InputSpec,
    preprocess: Preprocess | None,
    tokenizer: TextTokenizer | None,
    audio: AudioProcessor | None,
    *,
    optional: bool,
) -> InputDescription:
    dimensions = (Dimension(size, free=name) for size, name in spec.dimensions)
    return InputDescription(
        name=spec.name,
        dtype=spec.dtype_name,
        shape=(Dimension(1, batch=True), *dimensions),
        images=_images(preprocess) if preprocess else None,
        preprocessing=_preprocessing(spec, preprocess) if preprocess else "",
        optional=optional,
        texts=tokenizer is not None,
        tokenization=tokenizer.describe() if tokenizer else "",
        sampling_rate=audio.rate if audio else 0,
        audio_preprocessing=audio.describe() if audio else "",
    )


def _preprocessing(spec: InputSpec, preprocess: Preprocess) -> str:
    frames = f"{spec.images} frames for each item, in their order; " if spec.video else ""
    return f"{frames}{preprocess.describe()}"


def _images(preprocess: Preprocess) -> ImageDescription:
    described = ImageDescription(
        color=preprocess.color.value,
        exif_orientation=preprocess.exif_orientation,
        origin=preprocess.origin,
        assumed=tuple(preprocess.assumed),
    )
    steps = preprocess.steps
    if not isinstance(steps, Steps):
        return replace(described, custom=steps.name)
    if steps.resize:
        described = replace(
            described,
            resize=tuple(steps.resize),
            resize_mode=steps.resize_mode.value,
            interpolation=steps.interpolation,
        )
    return replace(described, crop=tuple(steps.crop), mean=tuple(steps.mean), std=tuple(steps.std))


def _layer(entry: LayerEntry, host: ModelHost, refused: _RefusedAlone) -> LayerDescription:
    shape = entry.geometry
    known = shape.layout is not Layout.UNKNOWN
    return LayerDescription(
        name=entry.name,
        type=entry.type,
        is_node=entry.kind is PointKind.NODE,
        calls=entry.calls,
        values={side: _value(spec) for side, spec in entry.specs.items()},
        refusals={
            extractor: {side: _refusal(entry, extractor, side, refused) for side in SIDES}
            for extractor in entry.support
        },
        stride=_stride(entry, host),
        channels=shape.channels,
        layout=shape.layout.value if known else "",
        grid=(shape.height, shape.width) if known else (),
        front_tokens=shape.front,
        same_as=entry.same_as,
        is_result=entry.is_result,
    )


def _value(spec: ValueSpec) -> ValueDescription:
    return ValueDescription(
        dtype=_name(spec.dtype),
        shape=tuple(map(_dimension, spec.dims)),
        bytes_per_item=spec.bytes_per_item,
        dynamic=spec.dynamic,
        interleaved=spec.interleaved,
        quantized=spec.quantized,
    )


def _dimension(dim: Dim) -> Dimension:
    return Dimension(
        dim.size,
        dim.batch,
        expression=str(dim.expression) if dim.expression and dim.expression.terms else "",
        varies=dim.expression is None,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
