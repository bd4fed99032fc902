"""Descriptions of models as JSON, without protobuf.

The JSON is that of a ``DescribeModelResponse`` in protobuf's JSON format, which other tools write
too: fields with their default value are left out, and 64-bit integers are strings.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from layertap.description import (
    Dimension,
    ImageDescription,
    InputDescription,
    LayerDescription,
    ModelDescription,
    PassDescription,
    ValueDescription,
)
from layertap.selection import Capture
from layertap.wire import dtypes
from layertap.wire.enums import to_proto

__all__ = ["description_to_json"]

_Object = dict[str, Any]


def description_to_json(description: ModelDescription) -> _Object:
    """Return the JSON object that describes a model and its layers."""
    return _object(
        model=_model(description),
        layers=[_layer(layer) for layer in description.layers],
        refused_plans=[
            _object(
                extractor=to_proto(plan.extractor, "EXTRACTOR"),
                layers=list(plan.layers),
                inputs=[
                    _object(name=item.name, dtype=_dtype(item.dtype), shape=_integers(item.shape))
                    for item in plan.inputs
                ],
                reason=plan.reason,
            )
            for plan in description.refused_plans
        ],
    )


def _model(description: ModelDescription) -> _Object:
    return _object(
        name=description.name,
        source=description.source,
        weights=description.weights,
        device=description.device,
        inputs=[_input(given) for given in description.inputs],
        declared_layers=list(description.declared_layers),
        notes=list(description.notes),
        pass_rules=_passes(description.passes),
        fingerprint=description.fingerprint,
        variants=[
            _object(extractor=to_proto(each, "EXTRACTOR"), names=list(names))
            for each, names in description.variants.items()
        ],
    )


def _input(given: InputDescription) -> _Object:
    return _object(
        dtype=_dtype(given.dtype),
        shape=_shape(given.shape),
        images=given.images is not None,
        preprocessing=given.preprocessing,
        image_preprocessing=_images(given.images),
        name=given.name,
        optional=given.optional,
        texts=given.texts,
        tokenization=given.tokenization,
        audio=given.sampling_rate > 0,
        sampling_rate=given.sampling_rate,
        audio_preprocessing=given.audio_preprocessing,
    )


def _images(images: ImageDescription | None) -> _Object | None:
    if images is None:
        return None
    return _object(
        color=images.color,
        exif_orientation=images.exif_orientation,
        resize=_integers(images.resize),
        resize_mode=images.resize_mode,
        interpolation=images.interpolation,
        crop=_integers(images.crop),
        mean=list(images.mean),
        std=list(images.std),
        origin=images.origin,
        assumed=list(images.assumed),
        custom=images.custom,
    )


def _layer(layer: LayerDescription) -> _Object:
    return _object(
        name=layer.name,
        kind=f"LAYER_KIND_{'NODE' if layer.is_node else 'MODULE'}",
        type=layer.type,
        calls=layer.calls,
        output=_value(layer.values.get(Capture.OUTPUT)),
        input=_value(layer.values.get(Capture.INPUT)),
        channels=_integer(layer.channels),
        reduction=layer.stride,
        extractors=[
            _object(
                extractor=to_proto(extractor, "EXTRACTOR"),
                captures=[
                    _object(capture=to_proto(side, "CAPTURE"), served=not reason, reason=reason)
                    for side, reason in reasons.items()
                ],
            )
            for extractor, reasons in layer.refusals.items()
        ],
        layout=f"LAYOUT_{layer.layout.upper()}" if layer.layout else None,
        grid=_integers(layer.grid),
        front_tokens=_integer(layer.front_tokens),
        same_as=layer.same_as,
        is_result=layer.is_result,
    )


def _value(value: ValueDescription | None) -> _Object | None:
    if value is None:
        return None
    return _object(
        dtype=_dtype(value.dtype),
        shape=_shape(value.shape),
        bytes_per_item=_integer(value.bytes_per_item),
        dynamic=value.dynamic,
        quantized=value.quantized,
        interleaved=value.interleaved,
    )


def _passes(passes: PassDescription | None) -> _Object | None:
    if passes is None:
        return None
    return _object(
        early_stop=passes.early_stop,
        concurrent=passes.concurrent,
        shared=passes.shared,
        state=f"KEPT_STATE_{passes.state.upper()}",
    )


def _shape(dimensions: Iterable[Dimension]) -> list[_Object]:
    return [
        _object(
            size=_integer(dim.size),
            batch=dim.batch,
            free=dim.free,
            expression=dim.expression,
            varies=dim.varies,
        )
        for dim in dimensions
    ]


def _object(**fields: object) -> _Object:
    """Return the fields without those that have their default value."""
    return {name: value for name, value in fields.items() if value or isinstance(value, dict)}


def _dtype(name: str) -> str | None:
    """Return the protocol's name of an element type; None for a type that it does not carry."""
    return dtypes.proto_name(name) if dtypes.is_known(name) else None


def _integer(value: int) -> str | None:
    return str(value) if value else None


def _integers(values: Iterable[int]) -> list[str]:
    return [str(value) for value in values]
