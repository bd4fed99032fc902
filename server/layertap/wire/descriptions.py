"""Descriptions of models as messages of ``layertap.v1``, and back."""

from __future__ import annotations

from typing import Any

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
from layertap.selection import Capture, Extractor
from layertap.v1 import catalogue_pb2, feature_service_pb2
from layertap.wire import dtypes
from layertap.wire.enums import from_proto, to_proto

__all__ = ["description_from_proto", "description_to_proto", "model_to_proto"]

UNKNOWN = "?"
"""The name in a description of an element type that the protocol does not have."""


def description_to_proto(
    description: ModelDescription,
) -> feature_service_pb2.DescribeModelResponse:
    """Return the message that describes a model and its layers."""
    return feature_service_pb2.DescribeModelResponse(
        model=model_to_proto(description),
        layers=map(_layer_to_proto, description.layers),
        refused_plans=[
            catalogue_pb2.RefusedPlan(
                extractor=to_proto(plan.extractor, "EXTRACTOR"),
                layers=plan.layers,
                inputs=[
                    catalogue_pb2.ItemTensor(
                        name=item.name, dtype=dtypes.proto_name(item.dtype), shape=item.shape
                    )
                    for item in plan.inputs
                ],
                reason=plan.reason,
            )
            for plan in description.refused_plans
        ],
    )


def model_to_proto(description: ModelDescription) -> catalogue_pb2.Model:
    """Return the message that describes a model without its layers."""
    return catalogue_pb2.Model(
        name=description.name,
        source=description.source,
        weights=description.weights,
        device=description.device,
        inputs=map(_input_to_proto, description.inputs),
        declared_layers=description.declared_layers,
        notes=description.notes,
        pass_rules=_passes_to_proto(description.passes),
        variants=[
            catalogue_pb2.ExtractorVariants(extractor=to_proto(each, "EXTRACTOR"), names=names)
            for each, names in description.variants.items()
        ],
        fingerprint=description.fingerprint,
    )


def description_from_proto(
    response: feature_service_pb2.DescribeModelResponse,
) -> ModelDescription:
    """Return the description of a model in a server's message."""
    model = response.model
    return ModelDescription(
        name=model.name,
        source=model.source,
        weights=model.weights,
        device=model.device,
        inputs=tuple(map(_input_from_proto, model.inputs)),
        layers=tuple(map(_layer_from_proto, response.layers)),
        passes=_passes_from_proto(model.pass_rules),
        notes=tuple(model.notes),
        declared_layers=tuple(model.declared_layers),
        refused_plans=tuple(map(_plan_from_proto, response.refused_plans)),
        variants={_extractor(each.extractor): tuple(each.names) for each in model.variants},
        fingerprint=model.fingerprint,
    )


def _input_to_proto(given: InputDescription) -> catalogue_pb2.InputSpec:
    return catalogue_pb2.InputSpec(
        name=given.name,
        dtype=dtypes.proto_name(given.dtype),
        shape=map(_dimension_to_proto, given.shape),
        images=given.images is not None,
        preprocessing=given.preprocessing,
        image_preprocessing=_images_to_proto(given.images),
        optional=given.optional,
        texts=given.texts,
        tokenization=given.tokenization,
        audio=given.sampling_rate > 0,
        sampling_rate=given.sampling_rate,
        audio_preprocessing=given.audio_preprocessing,
    )


def _input_from_proto(given: catalogue_pb2.InputSpec) -> InputDescription:
    return InputDescription(
        name=given.name,
        dtype=_dtype(given.dtype),
        shape=tuple(map(_dimension_from_proto, given.shape)),
        images=_images_from_proto(given.image_preprocessing) if given.images else None,
        preprocessing=given.preprocessing,
        optional=given.optional,
        texts=given.texts,
        tokenization=given.tokenization,
        sampling_rate=given.sampling_rate,
        audio_preprocessing=given.audio_preprocessing,
    )


def _images_to_proto(images: ImageDescription | None) -> catalogue_pb2.ImagePreprocessing | None:
    if images is None:
        return None
    return catalogue_pb2.ImagePreprocessing(
        color=images.color,
        exif_orientation=images.exif_orientation,
        resize=images.resize,
        resize_mode=images.resize_mode,
        interpolation=images.interpolation,
        crop=images.crop,
        mean=images.mean,
        std=images.std,
        origin=images.origin,
        assumed=images.assumed,
        custom=images.custom,
    )


def _images_from_proto(images: catalogue_pb2.ImagePreprocessing) -> ImageDescription:
    return ImageDescription(
        color=images.color,
        exif_orientation=images.exif_orientation,
        resize=tuple(images.resize),
        resize_mode=images.resize_mode,
        interpolation=images.interpolation,
        crop=tuple(images.crop),
        mean=tuple(images.mean),
        std=tuple(images.std),
        origin=images.origin,
        assumed=tuple(images.assumed),
        custom=images.custom,
    )


def _layer_to_proto(layer: LayerDescription) -> catalogue_pb2.Layer:
    return catalogue_pb2.Layer(
        name=layer.name,
        kind=f"LAYER_KIND_{'NODE' if layer.is_node else 'MODULE'}",
        type=layer.type,
        calls=layer.calls,
        output=_value_to_proto(layer.values.get(Capture.OUTPUT)),
        input=_value_to_proto(layer.values.get(Capture.INPUT)),
        channels=layer.channels,
        reduction=layer.stride,
        extractors=[
            catalogue_pb2.ExtractorSupport(
                extractor=to_proto(extractor, "EXTRACTOR"),
                captures=[
                    catalogue_pb2.CaptureSupport(
                        capture=to_proto(side, "CAPTURE"), served=not reason, reason=reason
                    )
                    for side, reason in reasons.items()
                ],
            )
            for extractor, reasons in layer.refusals.items()
        ],
        layout=f"LAYOUT_{layer.layout.upper() or 'UNSPECIFIED'}",
        grid=layer.grid,
        front_tokens=layer.front_tokens,
        same_as=layer.same_as,
        is_result=layer.is_result,
    )


def _layer_from_proto(layer: catalogue_pb2.Layer) -> LayerDescription:
    values = {}
    if layer.HasField("output"):
        values[Capture.OUTPUT] = _value_from_proto(layer.output)
    if layer.HasField("input"):
        values[Capture.INPUT] = _value_from_proto(layer.input)
    return LayerDescription(
        name=layer.name,
        type=layer.type,
        is_node=layer.kind == catalogue_pb2.LAYER_KIND_NODE,
        calls=layer.calls,
        values=values,
        refusals=dict(map(_refusals, layer.extractors)),
        stride=layer.reduction,
        channels=layer.channels,
        layout=_enum_word(layer.layout, catalogue_pb2.Layout, "LAYOUT"),
        grid=tuple(layer.grid),
        front_tokens=layer.front_tokens,
        same_as=layer.same_as,
        is_result=layer.is_result,
    )


def _refusals(support: catalogue_pb2.ExtractorSupport) -> tuple[Extractor, dict[Capture, str]]:
    extractor = _extractor(support.extractor)
    return extractor, {
        from_proto(verdict.capture, catalogue_pb2.Capture, "CAPTURE", Capture.OUTPUT): ""
        if verdict.served
        else verdict.reason or "the server does not say why"
        for verdict in support.captures
    }


def _value_to_proto(value: ValueDescription | None) -> catalogue_pb2.TensorSpec | None:
    if value is None:
        return None
    return catalogue_pb2.TensorSpec(
        dtype=dtypes.proto_name(value.dtype),
        shape=map(_dimension_to_proto, value.shape),
        bytes_per_item=value.bytes_per_item,
        dynamic=value.dynamic,
        interleaved=value.interleaved,
        quantized=value.quantized,
    )


def _value_from_proto(spec: catalogue_pb2.TensorSpec) -> ValueDescription:
    return ValueDescription(
        dtype=_dtype(spec.dtype),
        shape=tuple(map(_dimension_from_proto, spec.shape)),
        bytes_per_item=spec.bytes_per_item,
        dynamic=spec.dynamic,
        interleaved=spec.interleaved,
        quantized=spec.quantized,
    )


def _dimension_to_proto(dim: Dimension) -> catalogue_pb2.Dimension:
    return catalogue_pb2.Dimension(
        size=dim.size,
        batch=dim.batch,
        free=dim.free,
        expression=dim.expression,
        varies=dim.varies,
    )


def _dimension_from_proto(dim: catalogue_pb2.Dimension) -> Dimension:
    return Dimension(dim.size, dim.batch, dim.free, dim.expression, dim.varies)


def _passes_to_proto(passes: PassDescription | None) -> catalogue_pb2.PassRules | None:
    if passes is None:
        return None
    return catalogue_pb2.PassRules(
        early_stop=passes.early_stop,
        concurrent=passes.concurrent,
        shared=passes.shared,
        state=f"KEPT_STATE_{passes.state.upper()}",
    )


def _passes_from_proto(rules: catalogue_pb2.PassRules) -> PassDescription | None:
    if not rules.state:
        return None  # A server that does not say.
    state = _enum_word(rules.state, catalogue_pb2.KeptState, "KEPT_STATE")
    return PassDescription(rules.early_stop, rules.concurrent, rules.shared, state)


def _plan_from_proto(plan: catalogue_pb2.RefusedPlan) -> RefusedPlanDescription:
    return RefusedPlanDescription(
        extractor=_extractor(plan.extractor),
        layers=tuple(plan.layers),
        inputs=tuple(
            ItemDescription(item.name, _dtype(item.dtype), tuple(item.shape))
            for item in plan.inputs
        ),
        reason=plan.reason,
    )


def _extractor(number: int) -> Extractor:
    return from_proto(number, catalogue_pb2.Extractor, "EXTRACTOR", Extractor.AUTO)


def _dtype(number: int) -> str:
    return dtypes.by_number(number).name if number else UNKNOWN


def _enum_word(number: int, enum: Any, prefix: str) -> str:
    """Return the name of an enum's member as in descriptions; empty for an unknown number."""
    if number not in enum.values() or number == 0:
        return ""
    return str(enum.Name(number)).removeprefix(f"{prefix}_").lower()
