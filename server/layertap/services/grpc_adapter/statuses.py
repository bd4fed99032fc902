"""How an error is reported in gRPC: its status, and its trailing metadata."""

from __future__ import annotations

import random

import grpc

from layertap import errors
from layertap.services.caller import REQUEST_ID_KEY
from layertap.services.error_codes import ErrorCode
from layertap.wire.messages import (
    ERROR_IMAGE_METADATA_KEY,
    ERROR_METADATA_KEY,
    PUSHBACK_METADATA_KEY,
)

__all__ = ["STATUS", "error_metadata"]

STATUS: dict[ErrorCode, grpc.StatusCode] = {code: grpc.StatusCode[code.name] for code in ErrorCode}
"""gRPC's status for each code."""

# Each refusal gives a random time, so that clients that respect it don't retry together.
_PUSHBACK_MS = (500, 1500)


def error_metadata(error: errors.LayertapError, request_id: str) -> tuple[tuple[str, str], ...]:
    """Return the trailing metadata of a call that ends with an error."""
    names = [(ERROR_METADATA_KEY, type(error).__name__), (REQUEST_ID_KEY, request_id)]
    if isinstance(error, errors.OverloadedError):
        names.append((PUSHBACK_METADATA_KEY, str(random.randint(*_PUSHBACK_MS))))
    if isinstance(error, errors.InvalidInputError) and error.image is not None:
        names.append((ERROR_IMAGE_METADATA_KEY, str(error.image)))
    return tuple(names)
