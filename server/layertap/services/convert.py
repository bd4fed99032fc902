"""Converts requests of ``layertap.v1`` to the engine's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from layertap.engine import (
    AudioFiles,
    ExtractionRequest,
    ImageFiles,
    Inputs,
    Reservation,
    TextBatch,
)
from layertap.errors import InvalidInputError
from layertap.regrid import NO_REGRID
from layertap.selection import (
    Capture,
    Extractor,
    LayerSelection,
    MapForm,
    Method,
    Reduction,
    Sweep,
)
from layertap.services.shared_form import SharedForm
from layertap.shm.shared_memory import SessionMemory, SharedMemory, read_input
from layertap.texts import TextOptions, Truncation
from layertap.v1 import catalogue_pb2, feature_service_pb2
from layertap.wire import dtypes
from layertap.wire.enums import from_proto
from layertap.wire.interventions import interventions_from_proto
from layertap.wire.objectives import objective_from_proto
from layertap.wire.regrids import projection_from_proto, regrid_from_proto
from layertap.wire.small_tensors import array_from_proto
from layertap.wire.stream_messages import id_field
from layertap.wire.tensors import SharedTensor, TensorView

__all__ = [
    "Converter",
    "DecodedItem",
    "request_from_proto",
]

DecodedRequest = tuple[feature_service_pb2.ExtractRequest, Sequence[TensorView | SharedTensor]]
DecodedItem = tuple[feature_service_pb2.ExtractStreamRequest, Sequence[TensorView | SharedTensor]]
"""A request's small fields and its input tensors, as decoded by ``layertap.wire``."""


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
    audio = tuple(AudioFiles(each.audio, each.input) for each in request.audio)
    if not any((tensors, images, texts, audio)):
        raise InvalidInputError("inputs: got none, expected tensors, images, texts or audio")
    return ExtractionRequest(
        model=request.model,
        inputs=Inputs(tuple(tensors), images, texts, audio),
        selections=tuple(_selection(layer) for layer in request.layers),
        extractor=from_proto(
            request.extractor, catalogue_pb2.Extractor, "EXTRACTOR", Extractor.AUTO
        ),
        objective=objective_from_proto(request.objective),
        interventions=interventions_from_proto(request.interventions),
        variant=request.variant,
        form=partial(SharedForm, fields=reply_fields, memory=memory),
    )


def _texts(batch: feature_service_pb2.TextBatch) -> TextBatch:
    truncation = from_proto(
        batch.truncation, feature_service_pb2.Truncation, "TRUNCATION", Truncation.NONE
    )
    options = TextOptions(
        truncation, batch.max_tokens, not batch.omit_special_tokens, batch.return_tokens
    )
    return TextBatch(tuple(batch.texts), options, batch.input)


def _sweep(sweep: feature_service_pb2.Sweep) -> Sweep:
    usual = Sweep()
    return Sweep(
        steps=sweep.steps or usual.steps,
        rule=from_proto(
            sweep.rule, feature_service_pb2.IntegrationRule, "INTEGRATION_RULE", usual.rule
        ),
        baseline=array_from_proto(sweep.baseline_tensor, "sweep: baseline")
        if sweep.HasField("baseline_tensor")
        else sweep.baseline,
        noise=sweep.noise if sweep.HasField("noise") else usual.noise,
        seed=sweep.seed,
    )


def _selection(layer: feature_service_pb2.LayerSelection) -> LayerSelection:
    return LayerSelection(
        layer=layer.layer,
        capture=from_proto(layer.capture, catalogue_pb2.Capture, "CAPTURE", Capture.OUTPUT),
        alias=layer.alias,
        reduction=from_proto(
            layer.reduction, feature_service_pb2.Reduction, "REDUCTION", Reduction.NONE
        ),
        dtype=dtypes.by_number(layer.dtype).name if layer.dtype else "",
        method=from_proto(layer.method, feature_service_pb2.Method, "METHOD", Method.GRADIENT),
        map_form=from_proto(layer.map_form, feature_service_pb2.MapForm, "MAP_FORM", MapForm.GRID),
        sweep=_sweep(layer.sweep) if layer.HasField("sweep") else Sweep(),
        concat=tuple(layer.concat),
        regrid=regrid_from_proto(layer.regrid) if layer.HasField("regrid") else NO_REGRID,
        projection=projection_from_proto(layer.projection)
        if layer.HasField("projection")
        else None,
    )
