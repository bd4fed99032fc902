"""The messages of ``ExtractStream``: those of ``Extract`` with an id, read and written likewise.

Their fields have Extract's numbers, so the tensors go through the same code, without a copy.
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
from layertap.wire.messages import Find, found, split_request
from layertap.wire.tensors import SharedTensor, TensorView, decode_message

__all__ = [
    "decode_stream_reply",
    "decode_stream_request",
    "encode_stream_error",
    "id_field",
    "id_of",
]

_INPUTS = ExtractStreamRequest.INPUTS_FIELD_NUMBER
_IMAGES = ExtractStreamRequest.IMAGES_FIELD_NUMBER
_MOST_INPUTS = 1 << 16
_REPLY_TENSORS = ExtractStreamResponse.TENSORS_FIELD_NUMBER


def decode_stream_request(
    message: bytes,
) -> tuple[ExtractStreamRequest, list[TensorView | SharedTensor]]:
    """Split an ExtractStreamRequest into its small fields and its input tensors.

    Raises:
        DecodeError: For bytes that are no well-formed request.
    """
    rest, tensors = split_request(message)
    return _parse_request(rest), tensors


def id_of(message: bytes) -> int:
    """Return the id of an ExtractStreamRequest one of whose tensors contradicts itself.

    Only what is not an input is parsed: a request that was refused because its parts would cost the
    parser dearly is not to cost it now.

    Raises:
        DecodeError: For bytes that are no protobuf message, so that they have no id, and for more
            fields than are looked at.
    """
    try:
        for field in (_INPUTS, _IMAGES):
            message, _ = codec.split(message, field=field, most=_MOST_INPUTS)
    except ValueError as error:
        raise DecodeError(str(error)) from None
    return _parse_request(message).id


def id_field(number: int) -> bytes:
    """Return an ExtractStreamResponse with nothing but its id; of one size for all ids."""
    return ExtractStreamResponse(id=number).SerializeToString()


def encode_stream_error(
    number: int, code: int, kind: str, message: str, image: int | None = None
) -> bytes:
    """Return the reply to an item that failed.

    Args:
        number: The item's id.
        code: The number of a gRPC status.
        kind: The name of the error's class.
        message: Its text.
        image: The index of the image that it is about; None for none.
    """
    error = ExtractStreamError(code=code, kind=kind, message=message, image=image)
    return ExtractStreamResponse(id=number, error=error).SerializeToString()


def decode_stream_reply(
    message: bytes, find: Find | None = None
) -> tuple[ExtractStreamResponse, Sequence[TensorView]]:
    """Split an ExtractStreamResponse into its small fields and views of its tensors.

    ``find`` is that of ``decode_reply``.

    Raises:
        DecodeError: For bytes that are no well-formed response.
    """
    rest, tensors = decode_message(message, field=_REPLY_TENSORS)
    try:
        return ExtractStreamResponse.FromString(rest), found(tensors, find)
    except ProtobufDecodeError:
        raise DecodeError("reply: got bytes that are no ExtractStreamResponse") from None


def _parse_request(message: bytes) -> ExtractStreamRequest:
    try:
        return ExtractStreamRequest.FromString(message)
    except ProtobufDecodeError:
        raise DecodeError("request: got bytes that are no ExtractStreamRequest") from None
