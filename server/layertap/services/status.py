"""The one map from domain errors to gRPC statuses, and the one place where errors leave."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NoReturn

import grpc

from layertap import errors
from layertap.services.request import REQUEST_ID_KEY, Request, open_request
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
    errors.UnavailableError: Code.UNAVAILABLE,
    errors.DeadlineExceededError: Code.DEADLINE_EXCEEDED,
    errors.CancelledError: Code.CANCELLED,
    errors.ModelRunError: Code.INTERNAL,
    errors.ModelLoadError: Code.FAILED_PRECONDITION,
    errors.ConfigError: Code.FAILED_PRECONDITION,
    errors.InternalError: Code.INTERNAL,
}

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

    Domain errors carry their own text. Anything else is INTERNAL with the request's id; its trace
    goes to the log, and to the operator's traces where there are any.
    """

    def handle(message: bytes, context: grpc.ServicerContext) -> bytes:
        request = open_request(context)
        try:
            return handler(message, context)
        except errors.LayertapError as error:
            _abort(context, error, request)
        except Exception:  # noqa: BLE001 - the last line of defence; it is logged in full
            _log.exception("request %s failed", request.id)
            text = f"internal error; the server's log has it as {request.id}"
            _abort(context, errors.InternalError(text), request)

    return handle


def _abort(
    context: grpc.ServicerContext, error: errors.LayertapError, request: Request
) -> NoReturn:
    names = ((ERROR_METADATA_KEY, type(error).__name__), (REQUEST_ID_KEY, request.id))
    context.set_trailing_metadata(names)
    context.abort(status_of(type(error)), str(error))
    raise AssertionError("abort always raises")
