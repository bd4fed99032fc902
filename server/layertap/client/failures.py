"""From gRPC statuses back to the exceptions that the server raised."""

from __future__ import annotations

import grpc

from layertap import errors
from layertap.wire.messages import ERROR_METADATA_KEY

__all__ = ["error_from_rpc"]

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


def error_from_rpc(error: grpc.RpcError) -> errors.LayertapError:
    """Return the exception that the server named, else the one that its status stands for."""
    code, text = error.code(), error.details() or ""
    metadata = dict(error.trailing_metadata() or ())
    name = metadata.get(ERROR_METADATA_KEY, "")
    kind = getattr(errors, str(name), None) if name in errors.__all__ else None
    return (kind or _BY_CODE.get(code, errors.InternalError))(text or code.name)
