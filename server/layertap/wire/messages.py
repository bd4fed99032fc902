"""The messages of ``layertap.v1`` that carry tensors: read and written without a copy of them.

Everything small goes through the ordinary protobuf parser; only the tensors' payloads are kept out
of it.
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
"""Trailing metadata with the name of an error's class, so that clients can raise the same."""

ERROR_IMAGE_METADATA_KEY = "layertap-error-image"
"""Trailing metadata with the index of the image that an error is about."""

REPLY_COMPRESSION_KEY = "layertap-reply-compression"
"""Metadata of a call that requests a compressed reply."""

REPLY_COMPRESSIONS = ("none", "gzip", "deflate")
"""What it may say."""

PUSHBACK_METADATA_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata that says after how many milliseconds to call again (gRFC A6)."""

REPLY_TENSOR_FIELD = feature_service_pb2.ExtractResponse.TENSORS_FIELD_NUMBER
# Those of ExtractStreamRequest are the same.
_INPUTS_FIELD = feature_service_pb2.ExtractRequest.INPUTS_FIELD_NUMBER
_IMAGES_FIELD = feature_service_pb2.ExtractRequest.IMAGES_FIELD_NUMBER

MAX_INPUTS = 256
"""Tensors that a request may have. Each costs hundreds of bytes of memory, however small it is."""

Find = Callable[[SharedTensor], TensorView]
"""Finds the elements of a tensor in shared memory; raises LayertapError where it can't."""


def split_request(message: bytes) -> tuple[bytes, list[TensorView | SharedTensor]]:
    """Split an ExtractRequest or ExtractStreamRequest into its small rest and its input tensors.

    Raises:
        DecodeError: For a malformed message, or one with more tensors or fields than allowed.
    """
    return decode_message(message, field=_INPUTS_FIELD, most=MAX_INPUTS, counted=(_IMAGES_FIELD,))


def decode_request(
    message: bytes,
) -> tuple[feature_service_pb2.ExtractRequest, list[TensorView | SharedTensor]]:
    """Split an ExtractRequest into its small fields and its input tensors.

    Raises:
        DecodeError: For bytes that are no well-formed request.
    """
    rest, tensors = split_request(message)
    request = feature_service_pb2.ExtractRequest()
    try:
        request.ParseFromString(rest)
    except ProtobufDecodeError:
        raise DecodeError("request: got bytes that are no ExtractRequest") from None
    return request, tensors


def encode_request(
    request: feature_service_pb2.ExtractRequest | feature_service_pb2.ExtractStreamRequest,
    inputs: Arrays,
    places: Sequence[SharedSlice | None] = (),
) -> bytes:
    """Return a request with its input tensors.

    Args:
        request: The request without them; changed by this.
        inputs: The input tensors.
        places: For each of them, where its elements stand in shared memory; None if they are
            sent in the message. Empty if all of them are sent.

    Raises:
        InvalidInputError: For an array without a row in the dtype table, a rank over 32, or a
            message over 2**31 - 1 bytes.
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
        find: Finds tensors in shared memory; None if none was requested.

    Raises:
        DecodeError: For bytes that are no well-formed response.
    """
    rest, tensors = decode_message(message, field=REPLY_TENSOR_FIELD)
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
            raise DecodeError("reply: got a tensor in shared memory, which was not requested")
        else:
            views.append(find(tensor))
    return views
