"""The messages of ``ExtractStream``: those of ``Extract`` with an id.

Their fields have the same numbers as Extract's, so the same code reads and writes their tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.message import DecodeError as ProtobufDecodeError

from layertap.errors import DecodeError
from layertap.v1.feature_service_pb2 import (
    ExtractStreamError,
    ExtractStreamRequest,
    ExtractStreamResponse,
)
from layertap.wire import codec
from layertap.wire.messages import LIST_FIELDS, Find, found, split_request
from layertap.wire.tensors import SharedTensor, TensorView, decode_message

__all__ = [
    "decode_stream_reply",
    "decode_stream_request",
    "encode_stream_error",
    "id_field",
    "id_of",
]

_INPUTS = ExtractStreamRequest.INPUTS_FIELD_NUMBER
_MOST_INPUTS = 1 << 16
_REPLY_TENSORS = ExtractStreamResponse.TENSORS_FIELD_NUMBER


def decode_stream_request(
    message: bytes,
) -> tuple[ExtractStreamRequest, list[TensorView | SharedTensor]]:
    """Split an ExtractStreamRequest into its small fields and its input tensors.

    Raises:
        DecodeError: If the bytes are not a well-formed request.
    """
    rest, tensors = split_request(message)
    return _parse_request(rest), tensors


def id_of(message: bytes) -> int:
    """Return the id of an ExtractStreamRequest that was refused as malformed.

    This parses only fields that are not inputs, because the request may have been refused for
    inputs that would be expensive to parse.

    Raises:
        DecodeError: If the bytes are not a protobuf message, so that there is no id, or have too
            many fields.
    """
    try:
        for field in (_INPUTS, *LIST_FIELDS):
            message, _ = codec.split(message, field=field, most=_MOST_INPUTS)
    except ValueError as error:
        raise DecodeError(str(error)) from None
    return _parse_request(message).id


def id_field(number: int) -> bytes:
    """Return an ExtractStreamResponse with only an id; its size is the same for every id."""
    return ExtractStreamResponse(id=number).SerializeToString()


def encode_stream_error(
    number: int, code: int, kind: str, message: str, image: int | None = None
) -> bytes:
    """Return the reply to a failed item.

    Args:
        number: The item's id.
        code: The number of the gRPC status.
        kind: The class name of the error.
        message: The error's text.
        image: The index of the image that the error is about; None if it is about none.
    """
    error = ExtractStreamError(code=code, kind=kind, message=message, image=image)
    return ExtractStreamResponse(id=number, error=error).SerializeToString()


def decode_stream_reply(
    message: bytes, find: Find | None = None
) -> tuple[ExtractStreamResponse, Sequence[TensorView]]:
    """Split an ExtractStreamResponse into its small fields and views of its tensors.

    See ``decode_reply`` for ``find``.

    Raises:
        DecodeError: If the bytes are not a well-formed response.
    """
    rest, tensors = decode_message(message, field=_REPLY_TENSORS)
    try:
        return ExtractStreamResponse.FromString(rest), found(tensors, find)
    except ProtobufDecodeError:
        raise DecodeError("reply: got bytes that are not a valid ExtractStreamResponse") from None


def _parse_request(message: bytes) -> ExtractStreamRequest:
    try:
        return ExtractStreamRequest.FromString(message)
    except ProtobufDecodeError:
        raise DecodeError("request: got bytes that are not a valid ExtractStreamRequest") from None
