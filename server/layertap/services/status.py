"""The one map from domain errors to gRPC statuses, and the one place where errors leave."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from typing import NoReturn

import grpc

from layertap import errors
from layertap.wire.messages import ERROR_METADATA_KEY

__all__ = ["STATUS", "code_of", "guarded", "guarded_stream", "leaving", "status_of"]

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
StreamHandler = Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]


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


def leaving(error: Exception) -> errors.LayertapError:
    """Return the error as it may leave the server.

    Domain errors carry their own text. Anything else is an InternalError with a request id; its
    trace goes to the log and nowhere else. Call it where the error is being handled.
    """
    if isinstance(error, errors.LayertapError):
        return error
    request_id = uuid.uuid4().hex[:16]
    _log.exception("request %s failed", request_id)
    return errors.InternalError(f"internal error; the server's log has it as {request_id}")


def guarded(handler: Handler) -> Handler:
    """Wrap a handler so that whatever it raises becomes a status, as ``leaving`` says."""

    def handle(message: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return handler(message, context)
        except Exception as error:  # noqa: BLE001 - the last line of defence; it is logged in full
            _abort(context, leaving(error))

    return handle


def guarded_stream(handler: StreamHandler) -> StreamHandler:
    """Wrap the handler of a stream in the same way."""

    def handle(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            yield from handler(messages, context)
        except Exception as error:  # noqa: BLE001 - as above
            _abort(context, leaving(error))

    return handle


def _abort(context: grpc.ServicerContext, error: errors.LayertapError) -> NoReturn:
    context.set_trailing_metadata(((ERROR_METADATA_KEY, type(error).__name__),))
    context.abort(status_of(type(error)), str(error))
    raise AssertionError("abort always raises")
