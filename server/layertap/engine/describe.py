"""Describes a loaded model."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from layertap.description import (
    Dimension,
    InputDescription,
    LayerDescription,
    ModelDescription,
    PassDescription,
    RefusedPlan,
    ValueDescription,
)
from layertap.engine.host import ModelHost
from layertap.extraction.catalogue import LayerEntry, side_name
from layertap.extraction.layout import Layout
from layertap.extraction.points import PointKind, ValueSpec
from layertap.models import InputSpec, Preprocess
from layertap.models.text import TextTokenizer
from layertap.selection import Capture, Extractor

__all__ = ["RefusedAlone", "describe", "refusal", "refused_alone", "stride"]

RefusedAlone = Mapping[tuple[Extractor, str], str]
"""Why an extractor could not serve one side of a layer by itself, by extractor and side name."""


def describe(host: ModelHost) -> ModelDescription:
    """Describe a loaded model and its layers, including plans that were refused so far."""
    model, rules = host.model, host.catalogue.guard.rules
    refused = refused_alone(host)
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
            )
            for spec in model.signature.inputs
        ),
        layers=tuple(_layer(entry, host, refused) for entry in host.catalogue),
        passes=PassDescription(
            rules.early_stop, rules.concurrent, rules.shared, rules.state.name.lower()
        ),
        notes=(*host.catalogue.notes, *rules.notes),
        refused_plans=tuple(
            RefusedPlan(
                plan.layers,
                tuple((item.name, item.shape) for item in plan.batch_key.items),
                plan.reason,
            )
            for plan in host.refused_plans()
        ),
    )


def refused_alone(host: ModelHost) -> RefusedAlone:
    """Return the refusals so far that concern one layer by itself, for default items."""
    return {
        (plan.extractor, plan.layers[0]): plan.reason
        for plan in host.refused_plans()
        if len(plan.layers) == 1 and plan.batch_key == host.model.signature.key
    }


def refusal(entry: LayerEntry, extractor: Extractor, side: Capture, refused: RefusedAlone) -> str:
    """Return why an extractor can't capture one side of a layer; empty if it can."""
    found = refused.get((extractor, side_name(entry.name, side)), "")
    return found or entry.refusal(extractor, side)


def stride(entry: LayerEntry, host: ModelHost) -> float:
    """Return the height of the first input divided by that of a layer's grid; 0 without a grid."""
    if entry.geometry.layout is Layout.UNKNOWN:
        return 0.0
    return host.model.signature.main.shape[-2] / entry.geometry.height


def _input(
    spec: InputSpec, preprocess: Preprocess | None, tokenizer: TextTokenizer | None
) -> InputDescription:
    dimensions = (Dimension(size, free=name) for size, name in spec.dimensions)
    return InputDescription(
        name=spec.name,
        dtype=spec.dtype_name,
        shape=(Dimension(1, batch=True), *dimensions),
        images=preprocess is not None,
        preprocessing=preprocess.describe() if preprocess else "",
        optional=spec.optional,
        texts=tokenizer is not None,
        tokenization=tokenizer.describe() if tokenizer else "",
    )


def _layer(entry: LayerEntry, host: ModelHost, refused: RefusedAlone) -> LayerDescription:
    return LayerDescription(
        name=entry.name,
        type=entry.type,
        is_node=entry.kind is PointKind.NODE,
        calls=entry.calls,
        values={side: _value(spec) for side, spec in entry.specs.items()},
        refusals={
            extractor: {side: refusal(entry, extractor, side, refused) for side in Capture}
            for extractor in entry.support
        },
        stride=stride(entry, host),
        channels=entry.geometry.channels,
        same_as=entry.same_as,
        is_result=entry.is_result,
    )


def _value(spec: ValueSpec) -> ValueDescription:
    return ValueDescription(
        dtype=_name(spec.dtype),
        shape=tuple(Dimension(dim.size, dim.batch) for dim in spec.dims),
        bytes_per_item=spec.bytes_per_item,
        dynamic=spec.dynamic,
        interleaved=spec.interleaved,
        quantized=spec.quantized,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
