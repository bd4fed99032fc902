"""Converts a server's description of a model to the form that the command line shows."""

from __future__ import annotations

from layertap.description import (
    Dimension,
    InputDescription,
    LayerDescription,
    ModelDescription,
    PassDescription,
    RefusedPlan,
    ValueDescription,
)
from layertap.selection import Capture, Extractor
from layertap.v1 import catalogue_pb2, feature_service_pb2
from layertap.wire import dtypes
from layertap.wire.enums import from_proto

__all__ = ["described"]

_STATES = {
    catalogue_pb2.KEPT_STATE_NONE: "none",
    catalogue_pb2.KEPT_STATE_RESET: "reset",
    catalogue_pb2.KEPT_STATE_KEPT: "kept",
}


def described(response: feature_service_pb2.DescribeModelResponse) -> ModelDescription:
    """Convert a server's description of a model."""
    model = response.model
    return ModelDescription(
        name=model.name,
        source=model.source,
        weights=model.weights,
        device=model.device,
        inputs=tuple(map(_input, model.inputs)),
        layers=tuple(map(_layer, response.layers)),
        passes=_passes(model.pass_rules),
        notes=tuple(model.notes),
        refused_plans=tuple(
            RefusedPlan(
                tuple(plan.layers),
                tuple((given.name, tuple(given.shape)) for given in plan.inputs),
                plan.reason,
            )
            for plan in response.refused_plans
        ),
    )


def _input(given: catalogue_pb2.InputSpec) -> InputDescription:
    return InputDescription(
        name=given.name,
        dtype=_dtype(given.dtype),
        shape=tuple(Dimension(dim.size, dim.batch, dim.free) for dim in given.shape),
        images=given.images,
        preprocessing=given.preprocessing,
        optional=given.optional,
        texts=given.texts,
        tokenization=given.tokenization,
    )


def _layer(layer: catalogue_pb2.Layer) -> LayerDescription:
    values = {}
    if layer.HasField("output"):
        values[Capture.OUTPUT] = _value(layer.output)
    if layer.HasField("input"):
        values[Capture.INPUT] = _value(layer.input)
    return LayerDescription(
        name=layer.name,
        type=layer.type,
        is_node=layer.kind == catalogue_pb2.LAYER_KIND_NODE,
        calls=layer.calls,
        values=values,
        refusals=dict(map(_refusals, layer.extractors)),
        stride=layer.reduction,
        channels=layer.channels,
        same_as=layer.same_as,
        is_result=layer.is_result,
    )


def _value(spec: catalogue_pb2.TensorSpec) -> ValueDescription:
    return ValueDescription(
        dtype=_dtype(spec.dtype),
        shape=tuple(Dimension(dim.size, dim.batch) for dim in spec.shape),
        bytes_per_item=spec.bytes_per_item,
        dynamic=spec.dynamic,
        interleaved=spec.interleaved,
        quantized=spec.quantized,
    )


def _refusals(support: catalogue_pb2.ExtractorSupport) -> tuple[Extractor, dict[Capture, str]]:
    extractor = from_proto(support.extractor, catalogue_pb2.Extractor, "EXTRACTOR", Extractor.AUTO)
    return extractor, {
        from_proto(verdict.capture, catalogue_pb2.Capture, "CAPTURE", Capture.OUTPUT): ""
        if verdict.served
        else verdict.reason or "the server does not say why"
        for verdict in support.captures
    }


def _passes(rules: catalogue_pb2.PassRules) -> PassDescription | None:
    if not rules.state:
        return None  # A server that does not say.
    return PassDescription(
        rules.early_stop, rules.concurrent, rules.shared, _STATES.get(rules.state, "")
    )


def _dtype(number: int) -> str:
    return dtypes.by_number(number).name if number else "?"
