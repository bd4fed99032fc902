"""Converts gRPC statuses back to the exceptions that the server raised."""

from __future__ import annotations

import grpc

from layertap import errors
from layertap.v1.feature_service_pb2 import ExtractStreamError
from layertap.wire.messages import (
    ERROR_IMAGE_METADATA_KEY,
    ERROR_METADATA_KEY,
    PUSHBACK_METADATA_KEY,
)

__all__ = ["error_from_item", "error_from_rpc"]

Code = grpc.StatusCode

_BY_CODE: dict[grpc.StatusCode, type[errors.LayertapError]] = {
    Code.INVALID_ARGUMENT: errors.InvalidInputError,
    Code.NOT_FOUND: errors.NotFoundError,
    Code.FAILED_PRECONDITION: errors.ExtractorUnsupportedError,
    Code.OUT_OF_RANGE: errors.ReplyTooLargeError,
    Code.RESOURCE_EXHAUSTED: errors.OverloadedError,
    Code.UNAUTHENTICATED: errors.UnauthenticatedError,
    Code.PERMISSION_DENIED: errors.PermissionDeniedError,
    Code.UNAVAILABLE: errors.UnavailableError,
    Code.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    Code.CANCELLED: errors.CancelledError,
    Code.UNIMPLEMENTED: errors.UnavailableError,
}

# gRPC has no field for what these texts say. tests/client/test_failures.py provokes each of them,
# and fails if a release of gRPC words it differently.

# With the status CANCELLED: this process ended the call itself, by cancel() or by closing the
# channel. If the text is another one, the server or a machine in between ended the call.
_OWN_DOING = ("Locally cancelled by application!", "Channel closed!")

# With the status RESOURCE_EXHAUSTED: the message is over the limit. Otherwise a queue is full.
_TOO_LARGE = "larger than max"

# With the status UNAVAILABLE: the call was not sent.
_NOT_REACHED = (
    "failed to connect to all addresses", "connections to all backends failing",
    "errors resolving", "DNS resolution failed",
)  # fmt: skip

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in Code}


def error_from_rpc(error: grpc.RpcError) -> errors.LayertapError:
    """Return the exception that the server named, or else the one for the gRPC status."""
    metadata = dict(error.trailing_metadata() or ())
    name = str(metadata.get(ERROR_METADATA_KEY, ""))
    code, text = error.code(), error.details() or ""
    if code is Code.CANCELLED and not name and text not in _OWN_DOING:
        # gRPC resets a call that reaches a stopping server before its handler, or that takes longer
        # than the grace period.
        ended = errors.UnavailableError(f"the server ended the call: {text}")
        ended.refused = True
        return ended
    if code is Code.RESOURCE_EXHAUSTED and not name and _TOO_LARGE in text:
        # With an OverloadedError, the caller would retry in vain.
        return errors.InvalidInputError(f"the request is larger than the server accepts: {text}")
    failure = _error(code, name, text)
    if isinstance(failure, errors.OverloadedError):
        failure.retry_after = _pushback(str(metadata.get(PUSHBACK_METADATA_KEY, "")))
    if isinstance(failure, errors.UnavailableError):
        failure.refused = bool(name) or text.startswith(_NOT_REACHED)
    if isinstance(failure, errors.InvalidInputError):
        failure.image = _index(str(metadata.get(ERROR_IMAGE_METADATA_KEY, "")))
    return failure


def error_from_item(error: ExtractStreamError) -> errors.LayertapError:
    """Return the exception for a failed item of a stream, by the same rules."""
    failure = _error(_CODES.get(error.code, Code.UNKNOWN), error.kind, error.message)
    if isinstance(failure, errors.InvalidInputError) and error.HasField("image"):
        failure.image = error.image
    return failure


def _index(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 10 else None


def _pushback(text: str) -> float | None:
    """Return the seconds to wait; -1 for no retry, which is how gRFC A6 reads other values."""
    if not text:
        return None
    return int(text) / 1000 if text.isdecimal() and len(text) < 10 else -1.0


def _error(code: grpc.StatusCode, name: str, text: str) -> errors.LayertapError:
    kind = getattr(errors, name, None) if name in errors.__all__ else None
    return (kind or _BY_CODE.get(code, errors.InternalError))(text or code.name)
