"""Converts between protobuf messages and the engine's own types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from layertap.engine import (
    ExtractionRequest,
    ImageFiles,
    Inputs,
    ModelHost,
    Reservation,
    TextBatch,
)
from layertap.engine.describe import RefusedAlone, refusal, refused_alone, stride
from layertap.errors import InvalidInputError
from layertap.extraction import LayerEntry, PointKind, ValueSpec
from layertap.extraction.layout import Layout
from layertap.extraction.passes import KeptState, PassRules
from layertap.models import InputSpec, Preprocess, Steps
from layertap.models.text import TextTokenizer
from layertap.selection import Capture, Extractor, LayerSelection, Reduction
from layertap.services.shared_form import SharedForm
from layertap.shm.shared_memory import SessionMemory, SharedMemory, read_input
from layertap.texts import TextOptions, Truncation
from layertap.v1 import catalogue_pb2, feature_service_pb2
from layertap.wire import dtypes
from layertap.wire.enums import from_proto, to_proto
from layertap.wire.stream_messages import id_field
from layertap.wire.tensors import SharedTensor, TensorView

__all__ = [
    "Converter",
    "DecodedItem",
    "description_to_proto",
    "layer_to_proto",
    "model_to_proto",
    "request_from_proto",
]

DecodedRequest = tuple[feature_service_pb2.ExtractRequest, Sequence[TensorView | SharedTensor]]
DecodedItem = tuple[feature_service_pb2.ExtractStreamRequest, Sequence[TensorView | SharedTensor]]
"""A request's small fields and its input tensors, as decoded by ``layertap.wire``."""

_KINDS = {
    PointKind.MODULE: catalogue_pb2.LAYER_KIND_MODULE,
    PointKind.NODE: catalogue_pb2.LAYER_KIND_NODE,
}

_LAYOUTS = {
    Layout.UNKNOWN: catalogue_pb2.LAYOUT_UNSPECIFIED,
    Layout.CHANNELS_FIRST: catalogue_pb2.LAYOUT_CHANNELS_FIRST,
    Layout.CHANNELS_LAST: catalogue_pb2.LAYOUT_CHANNELS_LAST,
    Layout.TOKENS: catalogue_pb2.LAYOUT_TOKENS,
}
_KEPT = {
    KeptState.NONE: catalogue_pb2.KEPT_STATE_NONE,
    KeptState.RESET: catalogue_pb2.KEPT_STATE_RESET,
    KeptState.KEPT: catalogue_pb2.KEPT_STATE_KEPT,
}


@dataclass(frozen=True, slots=True)
class Converter:
    """Converts requests to the engine's own form.

    Attributes:
        input_bytes: Maximum bytes of a request's inputs in shared memory.
        memory: The memory shared with clients on this machine; None if there is none.
    """

    input_bytes: int
    memory: SharedMemory | None = None

    def convert_unary(
        self, decoded: DecodedRequest, received: Reservation
    ) -> tuple[str, ExtractionRequest[bytes]]:
        """Convert an ExtractRequest; return (model name, request). See ``convert`` for errors."""
        request = self.convert(*decoded, received)
        return request.model, request

    def convert_item(
        self, decoded: DecodedItem, received: Reservation
    ) -> tuple[str, ExtractionRequest[bytes]]:
        """Convert an ExtractStreamRequest in the same way; its id is added to the reply."""
        item, tensors = decoded
        request = self.convert(item, tensors, received, id_field(item.id))
        return request.model, request

    def convert(
        self,
        request: feature_service_pb2.ExtractRequest | feature_service_pb2.ExtractStreamRequest,
        tensors: Sequence[TensorView | SharedTensor],
        received: Reservation,
        reply_fields: bytes = b"",
    ) -> ExtractionRequest[bytes]:
        """Convert a parsed request, and copy its input out of shared memory.

        Args:
            request: The request's small fields.
            tensors: The request's input tensors.
            received: Counts the bytes that are copied out of shared memory.
            reply_fields: Serialized fields to add to the reply.

        Raises:
            InvalidInputError: See ``request_from_proto``; also if bytes are outside of the region.
            OverloadedError: If the copy would exceed the limit.
            SharedMemoryLostError: If the request names shared memory that is not lent to it.
        """
        memory = SessionMemory.find(self.memory, request.shared_memory_session)
        views: list[TensorView] = []
        left = self.input_bytes
        for tensor in tensors:
            if isinstance(tensor, SharedTensor):
                views.append(read_input(tensor, memory, left, received.take))
                left -= tensor.at.size
            else:
                views.append(tensor)
        return request_from_proto(request, views, reply_fields, memory)


def request_from_proto(
    request: feature_service_pb2.ExtractRequest | feature_service_pb2.ExtractStreamRequest,
    tensors: Sequence[TensorView],
    reply_fields: bytes = b"",
    memory: SessionMemory | None = None,
) -> ExtractionRequest[bytes]:
    """Convert a parsed request.

    Args:
        request: The request's small fields.
        tensors: The request's input tensors.
        reply_fields: Serialized fields to add to the reply.
        memory: The shared memory into which the reply's tensors may be written; None if none.

    Raises:
        InvalidInputError: For a missing input or an unknown enum value.
    """
    images = tuple(ImageFiles(each.images, each.input) for each in request.images)
    texts = tuple(map(_texts, request.texts))
    if not tensors and not images and not texts:
        raise InvalidInputError("inputs: got none, expected tensors, images or texts")
    return ExtractionRequest(
        model=request.model,
        inputs=Inputs(tuple(tensors), images, texts),
        selections=tuple(_selection(layer) for layer in request.layers),
        extractor=from_proto(
            request.extractor, catalogue_pb2.Extractor, "EXTRACTOR", Extractor.AUTO
        ),
        form=partial(SharedForm, fields=reply_fields, memory=memory),
    )


def model_to_proto(host: ModelHost) -> catalogue_pb2.Model:
    """Describe a served model."""
    model = host.model
    return catalogue_pb2.Model(
        name=model.name,
        source=model.source,
        weights=model.weights,
        device=str(model.device),
        inputs=[
            _input(
                spec,
                model.preprocess if spec.name in model.image_inputs else None,
                model.tokenizer if spec.name in model.text_inputs else None,
            )
            for spec in model.signature.inputs
        ],
        declared_layers=[selection.name_for(selection.layer) for selection in host.declared],
        notes=[*host.catalogue.notes, *host.catalogue.guard.rules.notes],
        pass_rules=_pass_rules(host.catalogue.guard.rules),
    )


def _input(
    spec: InputSpec, preprocess: Preprocess | None, tokenizer: TextTokenizer | None
) -> catalogue_pb2.InputSpec:
    dimension = catalogue_pb2.Dimension
    return catalogue_pb2.InputSpec(
        name=spec.name,
        dtype=_dtype_name(spec.dtype),
        shape=[
            dimension(size=1, batch=True),
            *(dimension(size=size, free=name) for size, name in spec.dimensions),
        ],
        images=preprocess is not None,
        preprocessing=preprocess.describe() if preprocess else "",
        image_preprocessing=_preprocessing(preprocess),
        optional=spec.optional,
        texts=tokenizer is not None,
        tokenization=tokenizer.describe() if tokenizer else "",
    )


def _preprocessing(preprocess: Preprocess | None) -> catalogue_pb2.ImagePreprocessing | None:
    if preprocess is None:
        return None
    described = catalogue_pb2.ImagePreprocessing(
        color=preprocess.color,
        exif_orientation=preprocess.exif_orientation,
        origin=preprocess.origin,
        assumed=preprocess.assumed,
    )
    steps = preprocess.steps
    if not isinstance(steps, Steps):
        described.custom = steps.name
        return described
    if steps.resize:
        described.resize.extend(steps.resize)
        described.resize_mode = steps.resize_mode
        described.interpolation = steps.interpolation
    described.crop.extend(steps.crop)
    described.mean.extend(steps.mean)
    described.std.extend(steps.std)
    return described


def description_to_proto(host: ModelHost) -> feature_service_pb2.DescribeModelResponse:
    """Describe a served model and its layers.

    If a plan was refused for one layer alone, the reason is listed at that layer, too.
    """
    refused = refused_alone(host)
    return feature_service_pb2.DescribeModelResponse(
        model=model_to_proto(host),
        layers=[layer_to_proto(entry, host, refused) for entry in host.catalogue],
        refused_plans=[
            catalogue_pb2.RefusedPlan(
                extractor=to_proto(plan.extractor, "EXTRACTOR"),
                layers=plan.layers,
                inputs=[
                    catalogue_pb2.ItemTensor(
                        name=item.name, dtype=_dtype_name(item.dtype), shape=item.shape
                    )
                    for item in plan.batch_key.items
                ],
                reason=plan.reason,
            )
            for plan in host.refused_plans()
        ],
    )


def layer_to_proto(
    entry: LayerEntry, host: ModelHost, refused: RefusedAlone = MappingProxyType({})
) -> catalogue_pb2.Layer:
    """Describe a layer of a served model."""
    shape = entry.geometry
    known = shape.layout is not Layout.UNKNOWN
    return catalogue_pb2.Layer(
        name=entry.name,
        kind=_KINDS[entry.kind],
        type=entry.type,
        calls=entry.calls,
        output=_spec(entry.specs.get(Capture.OUTPUT)),
        input=_spec(entry.specs.get(Capture.INPUT)),
        channels=shape.channels,
        reduction=stride(entry, host),
        extractors=[_support(entry, extractor, refused) for extractor in entry.support],
        layout=_LAYOUTS[shape.layout],
        grid=[shape.height, shape.width] if known else [],
        front_tokens=shape.front,
        same_as=entry.same_as,
        is_result=entry.is_result,
    )


def _pass_rules(rules: PassRules) -> catalogue_pb2.PassRules:
    return catalogue_pb2.PassRules(
        early_stop=rules.early_stop,
        concurrent=rules.concurrent,
        shared=rules.shared,
        state=_KEPT[rules.state],
    )


def _texts(batch: feature_service_pb2.TextBatch) -> TextBatch:
    truncation = from_proto(
        batch.truncation, feature_service_pb2.Truncation, "TRUNCATION", Truncation.NONE
    )
    options = TextOptions(
        truncation, batch.max_tokens, not batch.omit_special_tokens, batch.return_tokens
    )
    return TextBatch(tuple(batch.texts), options, batch.input)


def _selection(layer: feature_service_pb2.LayerSelection) -> LayerSelection:
    return LayerSelection(
        layer=layer.layer,
        capture=from_proto(layer.capture, catalogue_pb2.Capture, "CAPTURE", Capture.OUTPUT),
        alias=layer.alias,
        reduction=from_proto(
            layer.reduction, feature_service_pb2.Reduction, "REDUCTION", Reduction.NONE
        ),
        dtype=dtypes.by_number(layer.dtype).name if layer.dtype else "",
    )


def _support(
    entry: LayerEntry, extractor: Extractor, refused: RefusedAlone
) -> catalogue_pb2.ExtractorSupport:
    reasons = {side: refusal(entry, extractor, side, refused) for side in Capture}
    return catalogue_pb2.ExtractorSupport(
        extractor=to_proto(extractor, "EXTRACTOR"),
        captures=[
            catalogue_pb2.CaptureSupport(
                capture=to_proto(side, "CAPTURE"), served=not reason, reason=reason
            )
            for side, reason in reasons.items()
        ],
    )


def _spec(spec: ValueSpec | None) -> catalogue_pb2.TensorSpec | None:
    if spec is None:
        return None
    return catalogue_pb2.TensorSpec(
        dtype=_dtype_name(spec.dtype),
        shape=[catalogue_pb2.Dimension(size=dim.size, batch=dim.batch) for dim in spec.dims],
        bytes_per_item=spec.bytes_per_item,
        dynamic=spec.dynamic,
        interleaved=spec.interleaved,
        quantized=spec.quantized,
    )


def _dtype_name(dtype: object) -> Any:
    """Return the dtype's name in the protocol, or UNSPECIFIED if the protocol has no such dtype."""
    name = str(dtype).removeprefix("torch.")
    row = next((row for row in dtypes.DTYPES if row.name == name), None)
    return row.proto_name if row else "DATA_TYPE_UNSPECIFIED"
