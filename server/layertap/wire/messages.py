"""The messages of ``layertap.v1`` that carry tensors: read and written without a copy of them.

Everything small goes through the ordinary protobuf parser; only the tensors' payloads are kept out
of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError as ProtobufDecodeError

from layertap.errors import DecodeError
from layertap.selection import Extractor
from layertap.v1 import feature_service_pb2, tensor_pb2
from layertap.wire.dtypes import of_array
from layertap.wire.enums import to_proto
from layertap.wire.tensors import (
    SharedSlice,
    SharedTensor,
    TensorView,
    decode_message,
    encode_message,
)

__all__ = [
    "ERROR_METADATA_KEY",
    "PUSHBACK_METADATA_KEY",
    "REPLY_COMPRESSIONS",
    "REPLY_COMPRESSION_KEY",
    "REPLY_HEAD_SIZE",
    "REPLY_TENSOR_FIELD",
    "Find",
    "Timings",
    "decode_reply",
    "decode_request",
    "encode_reply_head",
    "encode_request",
    "encode_shared_request",
    "found",
]

ERROR_METADATA_KEY = "layertap-error"
"""Trailing metadata with the name of an error's class, so that clients can raise the same."""

REPLY_COMPRESSION_KEY = "layertap-reply-compression"
"""Metadata of a call that asks for a compressed reply."""

REPLY_COMPRESSIONS = ("none", "gzip", "deflate")
"""What it may say."""

PUSHBACK_METADATA_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata that says after how many milliseconds to call again (gRFC A6)."""

REPLY_TENSOR_FIELD = feature_service_pb2.ExtractResponse.TENSORS_FIELD_NUMBER
_REQUEST_TENSOR_FIELD = feature_service_pb2.ExtractRequest.TENSOR_FIELD_NUMBER
_REQUEST_IMAGES_FIELD = feature_service_pb2.ExtractRequest.IMAGES_FIELD_NUMBER


Find = Callable[[SharedTensor], TensorView]
"""Finds the elements of a tensor in shared memory; raises LayertapError where it can't."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a request went, in nanoseconds; see ``layertap.v1.Timings``."""

    prepare_ns: int = 0
    queue_ns: int = 0
    compute_ns: int = 0
    total_ns: int = 0


def decode_request(
    message: bytes,
) -> tuple[feature_service_pb2.ExtractRequest, TensorView | SharedTensor | None]:
    """Split an ExtractRequest into its small fields and its input tensor, if it has one.

    Raises:
        DecodeError: For bytes that are no well-formed request.
    """
    rest, tensors = decode_message(
        message, field=_REQUEST_TENSOR_FIELD, repeated=False, rivals=(_REQUEST_IMAGES_FIELD,)
    )
    request = feature_service_pb2.ExtractRequest()
    try:
        request.ParseFromString(rest)
    except ProtobufDecodeError:
        raise DecodeError("request: got bytes that are no ExtractRequest") from None
    return request, tensors[0] if tensors else None


def encode_request(request: feature_service_pb2.ExtractRequest, tensor: np.ndarray | None) -> bytes:
    """Return an ExtractRequest with ``tensor``, if given, as its input."""
    head = request.SerializeToString()
    if tensor is None:
        return head
    return encode_message([("", tensor)], field=_REQUEST_TENSOR_FIELD, head=head)


def encode_shared_request(
    request: feature_service_pb2.ExtractRequest, tensor: np.ndarray, at: SharedSlice
) -> bytes:
    """Return an ExtractRequest whose input, an array like ``tensor``, stands in shared memory.

    Raises:
        InvalidInputError: For an array without a row in the dtype table.
    """
    request.tensor.dtype = of_array(tensor).number  # type: ignore[assignment] # an enum's number
    request.tensor.shape.extend(tensor.shape)
    request.tensor.shared.CopyFrom(tensor_pb2.SharedSlice(**at._asdict()))
    return request.SerializeToString()


def encode_reply_head(extractor: Extractor, timings: Timings) -> bytes:
    """Return an ExtractResponse without tensors; always of REPLY_HEAD_SIZE bytes."""
    response = feature_service_pb2.ExtractResponse(
        extractor=to_proto(extractor, "EXTRACTOR"),
        timings=feature_service_pb2.Timings(
            prepare_ns=timings.prepare_ns,
            queue_ns=timings.queue_ns,
            compute_ns=timings.compute_ns,
            total_ns=timings.total_ns,
        ),
    )
    return response.SerializeToString()


REPLY_HEAD_SIZE = len(encode_reply_head(next(iter(Extractor)), Timings()))


def decode_reply(
    message: bytes, find: Find | None = None
) -> tuple[feature_service_pb2.ExtractResponse, Sequence[TensorView]]:
    """Split an ExtractResponse into its small fields and views of its tensors.

    Args:
        message: The whole message.
        find: Finds tensors in shared memory; None where none was asked for.

    Raises:
        DecodeError: For bytes that are no well-formed response.
    """
    rest, tensors = decode_message(message, field=REPLY_TENSOR_FIELD, repeated=True)
    response = feature_service_pb2.ExtractResponse()
    try:
        response.ParseFromString(rest)
    except ProtobufDecodeError:
        raise DecodeError("reply: got bytes that are no ExtractResponse") from None
    return response, found(tensors, find)


def found(tensors: Sequence[TensorView | SharedTensor], find: Find | None) -> list[TensorView]:
    """Return tensors with their elements; raise DecodeError for shared memory without ``find``."""
    views = []
    for tensor in tensors:
        if isinstance(tensor, TensorView):
            views.append(tensor)
        elif find is None:
            raise DecodeError("reply: got a tensor in shared memory, which was not asked for")
        else:
            views.append(find(tensor))
    return views
