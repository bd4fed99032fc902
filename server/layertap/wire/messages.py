"""The messages of ``layertap.v1`` that contain tensors, read and written without copying these.

Only the payloads of tensors get special treatment; everything else goes through the ordinary
protobuf parser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from google.protobuf.message import DecodeError as ProtobufDecodeError

from layertap.errors import DecodeError
from layertap.v1 import feature_service_pb2, tensor_pb2
from layertap.wire.dtypes import of_array
from layertap.wire.tensors import (
    Arrays,
    SharedSlice,
    SharedTensor,
    TensorView,
    decode_message,
    encode_message,
)

__all__ = [
    "ERROR_IMAGE_METADATA_KEY",
    "ERROR_METADATA_KEY",
    "LIST_FIELDS",
    "MAX_INPUTS",
    "PUSHBACK_METADATA_KEY",
    "REPLY_COMPRESSIONS",
    "REPLY_COMPRESSION_KEY",
    "REPLY_TENSOR_FIELD",
    "Find",
    "decode_reply",
    "decode_request",
    "encode_request",
    "found",
    "split_request",
]

ERROR_METADATA_KEY = "layertap-error"
"""Trailing metadata with the class name of an error, so that clients can raise the same class."""

ERROR_IMAGE_METADATA_KEY = "layertap-error-image"
"""Trailing metadata with the index of the image that an error is about."""

REPLY_COMPRESSION_KEY = "layertap-reply-compression"
"""Metadata of a call that requests a compressed reply."""

REPLY_COMPRESSIONS = ("none", "gzip", "deflate")
"""The values that it may have."""

PUSHBACK_METADATA_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata with the number of milliseconds to wait before a retry (gRFC A6)."""

REPLY_TENSOR_FIELD = feature_service_pb2.ExtractResponse.TENSORS_FIELD_NUMBER
# ExtractStreamRequest uses the same field numbers.
_INPUTS_FIELD = feature_service_pb2.ExtractRequest.INPUTS_FIELD_NUMBER
LIST_FIELDS = (
    feature_service_pb2.ExtractRequest.IMAGES_FIELD_NUMBER,
    feature_service_pb2.ExtractRequest.TEXTS_FIELD_NUMBER,
    feature_service_pb2.ExtractRequest.AUDIO_FIELD_NUMBER,
    feature_service_pb2.ExtractRequest.OBJECTIVE_FIELD_NUMBER,
    feature_service_pb2.ExtractRequest.INTERVENTIONS_FIELD_NUMBER,
)
"""The fields with lists of images, texts, recordings, terms and interventions, whose members count
as fields."""

MAX_INPUTS = 256
"""Maximum number of tensors in a request. Even a tiny one costs hundreds of bytes of memory."""

Find = Callable[[SharedTensor], TensorView]
"""Finds the elements of a tensor in shared memory; raises LayertapError if it can't."""


def split_request(message: bytes) -> tuple[bytes, list[TensorView | SharedTensor]]:
    """Split an ExtractRequest or ExtractStreamRequest into its small fields and input tensors.

    Raises:
        DecodeError: If it is malformed, or has more tensors or fields than allowed.
    """
    return decode_message(message, field=_INPUTS_FIELD, most=MAX_INPUTS, counted=LIST_FIELDS)


def decode_request(
    message: bytes,
) -> tuple[feature_service_pb2.ExtractRequest, list[TensorView | SharedTensor]]:
    """Split an ExtractRequest into its small fields and its input tensors.

    Raises:
        DecodeError: If the bytes are not a well-formed request.
    """
    rest, tensors = split_request(message)
    request = feature_service_pb2.ExtractRequest()
    try:
        request.ParseFromString(rest)
    except ProtobufDecodeError:
        raise DecodeError("request: got bytes that are not a valid ExtractRequest") from None
    return request, tensors


def encode_request(
    request: feature_service_pb2.ExtractRequest | feature_service_pb2.ExtractStreamRequest,
    inputs: Arrays,
    places: Sequence[SharedSlice | None] = (),
) -> bytes:
    """Encode a request with its input tensors.

    Args:
        request: The request without the tensors. This function changes it.
        inputs: The input tensors.
        places: For each tensor its place in shared memory, or None if it is sent in the message.
            Empty if all tensors are sent in the message.

    Raises:
        InvalidInputError: If an array's dtype has no row in the dtype table, its rank is over 32,
            or the message would exceed 2**31 - 1 bytes.
    """
    sent = []
    for (name, array), place in zip(inputs, places or (None,) * len(inputs), strict=True):
        if place is None:
            sent.append((name, array))
            continue
        request.inputs.add(
            name=name,
            dtype=of_array(array).proto_name,
            shape=array.shape,
            shared=tensor_pb2.SharedSlice(**place._asdict()),
        )
    head = request.SerializeToString()
    return encode_message(sent, field=_INPUTS_FIELD, head=head) if sent else head


def decode_reply(
    message: bytes, find: Find | None = None
) -> tuple[feature_service_pb2.ExtractResponse, Sequence[TensorView]]:
    """Split an ExtractResponse into its small fields and views of its tensors.

    Args:
        message: The whole message.
        find: Finds tensors in shared memory; None if no shared memory was requested.

    Raises:
        DecodeError: If the bytes are not a well-formed response.
    """
    rest, tensors = decode_message(message, field=REPLY_TENSOR_FIELD)
    response = feature_service_pb2.ExtractResponse()
    try:
        response.ParseFromString(rest)
    except ProtobufDecodeError:
        raise DecodeError("reply: got bytes that are not a valid ExtractResponse") from None
    return response, found(tensors, find)


def found(tensors: Sequence[TensorView | SharedTensor], find: Find | None) -> list[TensorView]:
    """Return tensors with their elements; raise DecodeError if ``find`` is needed but None."""
    views = []
    for tensor in tensors:
        if isinstance(tensor, TensorView):
            views.append(tensor)
        elif find is None:
            raise DecodeError("reply: got a tensor in shared memory, which was not requested")
        else:
            views.append(find(tensor))
    return views
