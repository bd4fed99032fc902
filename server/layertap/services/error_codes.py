"""Maps each error to a code that is independent of the protocol.

Each transport maps these codes to its own; for gRPC, ``layertap.services.grpc_adapter.handlers``
does so.
"""

from __future__ import annotations

from enum import Enum

from layertap import errors

__all__ = ["CODES", "ErrorCode", "code_of"]


class ErrorCode(Enum):
    """The codes of ``google.rpc.Code`` that layertap uses, with their numbers.

    Metrics and logs show the names; the error of a stream's item has the number.
    """

    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    FAILED_PRECONDITION = 9
    OUT_OF_RANGE = 11
    RESOURCE_EXHAUSTED = 8
    UNAUTHENTICATED = 16
    PERMISSION_DENIED = 7
    UNAVAILABLE = 14
    DEADLINE_EXCEEDED = 4
    CANCELLED = 1
    INTERNAL = 13


CODES: dict[type[errors.LayertapError], ErrorCode] = {
    errors.InvalidInputError: ErrorCode.INVALID_ARGUMENT,
    errors.NotFoundError: ErrorCode.NOT_FOUND,
    errors.ExtractorUnsupportedError: ErrorCode.FAILED_PRECONDITION,
    errors.ReplyTooLargeError: ErrorCode.OUT_OF_RANGE,
    errors.SharedMemoryLostError: ErrorCode.FAILED_PRECONDITION,
    errors.OverloadedError: ErrorCode.RESOURCE_EXHAUSTED,
    errors.UnauthenticatedError: ErrorCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: ErrorCode.PERMISSION_DENIED,
    errors.UnavailableError: ErrorCode.UNAVAILABLE,
    errors.DeadlineExceededError: ErrorCode.DEADLINE_EXCEEDED,
    errors.CancelledError: ErrorCode.CANCELLED,
    errors.ModelRunError: ErrorCode.INTERNAL,
    errors.ModelLoadError: ErrorCode.FAILED_PRECONDITION,
    errors.ConfigError: ErrorCode.FAILED_PRECONDITION,
    errors.InternalError: ErrorCode.INTERNAL,
}
"""The code of each error class. A subclass without an entry has its nearest base class's code."""


def code_of(error: Exception) -> ErrorCode:
    """Return the code for reporting an error; INTERNAL for an error that is not layertap's.

    Raises:
        KeyError: If neither the error's class nor any base class has a code.
    """
    if isinstance(error, MemoryError):
        return ErrorCode.RESOURCE_EXHAUSTED
    if not isinstance(error, errors.LayertapError):
        return ErrorCode.INTERNAL
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    raise KeyError(type(error))
