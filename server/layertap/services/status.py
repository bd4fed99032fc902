"""The one map from domain errors to gRPC statuses, and the one place where errors leave."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from typing import NoReturn

import grpc

from layertap import errors
from layertap.wire.messages import ERROR_METADATA_KEY

__all__ = ["STATUS", "code_of", "guarded", "status_of"]

_log = logging.getLogger(__name__)

Code = grpc.StatusCode

STATUS: dict[type[errors.LayertapError], grpc.StatusCode] = {
    errors.InvalidInputError: Code.INVALID_ARGUMENT,
    errors.NotFoundError: Code.NOT_FOUND,
    errors.ExtractorUnsupportedError: Code.FAILED_PRECONDITION,
    errors.ReplyTooLargeError: Code.OUT_OF_RANGE,
    errors.OverloadedError: Code.RESOURCE_EXHAUSTED,
    errors.UnauthenticatedError: Code.UNAUTHENTICATED,
    errors.PermissionDeniedError: Code.PERMISSION_DENIED,
    errors.UnavailableError: Code.UNAVAILABLE,
    errors.DeadlineExceededError: Code.DEADLINE_EXCEEDED,
    errors.CancelledError: Code.CANCELLED,
    errors.ModelRunError: Code.INTERNAL,
    errors.ModelLoadError: Code.FAILED_PRECONDITION,
    errors.ConfigError: Code.FAILED_PRECONDITION,
    errors.InternalError: Code.INTERNAL,
}

# Of the operator's side, whose texts name files and hold what a model's own code says.
_PRIVATE = (errors.ConfigError, errors.ModelLoadError)

# A text travels in a header, each byte of it as up to three, and a client's gRPC takes 8 KiB of
# headers by default: a longer one would replace the error by another. Requests are quoted in it.
_TEXT_BYTES = 2048

Handler = Callable[[bytes, grpc.ServicerContext], bytes]


def status_of(kind: type[errors.LayertapError]) -> grpc.StatusCode:
    """Return the status of an error class: its own, else its nearest base's.

    Raises:
        KeyError: For a class that nothing maps.
    """
    for base in kind.__mro__:
        if base in STATUS:
            return STATUS[base]
    raise KeyError(kind)


def code_of(error: Exception) -> grpc.StatusCode:
    """Return the status that an error leaves with; INTERNAL for what is no domain error."""
    return status_of(type(error)) if isinstance(error, errors.LayertapError) else Code.INTERNAL


def guarded(handler: Handler) -> Handler:
    """Wrap a handler so that whatever it raises becomes a status.

    Domain errors carry their own text, except for those that speak of the server's files. Anything
    else is INTERNAL with a request id; its trace goes
    to the log and nowhere else.
    """

    def handle(message: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return handler(message, context)
        except errors.LayertapError as error:
            _abort(context, error)
        except Exception:  # noqa: BLE001 - the last line of defence; it is logged in full
            request_id = _new_id()
            _log.exception("request %s failed", request_id)
            _abort(
                context,
                errors.InternalError(f"internal error; the server's log has it as {request_id}"),
            )

    return handle


def _abort(context: grpc.ServicerContext, error: errors.LayertapError) -> NoReturn:
    context.set_trailing_metadata(((ERROR_METADATA_KEY, type(error).__name__),))
    context.abort(status_of(type(error)), _text(error))
    raise AssertionError("abort always raises")


def _text(error: errors.LayertapError) -> str:
    """Return what may leave of an error's text."""
    if isinstance(error, _PRIVATE):
        request_id = _new_id()
        _log.error("request %s failed: %s", request_id, error)
        return f"the server could not do it; its log has the reason as {request_id}"
    text = str(error)
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= _TEXT_BYTES:
        return text
    return encoded[:_TEXT_BYTES].decode("utf-8", "ignore") + " …"


def _new_id() -> str:
    return uuid.uuid4().hex[:16]
