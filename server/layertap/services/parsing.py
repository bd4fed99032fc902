"""Parses the small messages of all services: bytes in, a message or DecodeError out."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError as ProtobufDecodeError
from google.protobuf.message import Message

from layertap.errors import DecodeError

__all__ = ["parse"]

M = TypeVar("M", bound=Message)


def parse(kind: type[M], message: bytes) -> M:
    """Parse bytes as a message.

    Args:
        kind: The class of the message.
        message: The bytes.

    Raises:
        DecodeError: If they are not such a message.
    """
    request = kind()
    try:
        request.ParseFromString(message)
    except ProtobufDecodeError:
        raise DecodeError(f"request: got bytes that are not a valid {kind.__name__}") from None
    return request
