"""The one map from domain errors to gRPC statuses, and the one place where errors leave."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from typing import NoReturn

import grpc

from layertap import errors
from layertap.services.compression import compress_replies
from layertap.services.current_request import REQUEST_ID_KEY, Request, current_request, open_request
from layertap.wire.messages import ERROR_METADATA_KEY, PUSHBACK_METADATA_KEY

__all__ = [
    "STATUS",
    "code_of",
    "guarded",
    "guarded_stream",
    "leaving",
    "status_of",
]

_log = logging.getLogger(__name__)

Code = grpc.StatusCode

STATUS: dict[type[errors.LayertapError], grpc.StatusCode] = {
    errors.InvalidInputError: Code.INVALID_ARGUMENT,
    errors.NotFoundError: Code.NOT_FOUND,
    errors.ExtractorUnsupportedError: Code.FAILED_PRECONDITION,
    errors.ReplyTooLargeError: Code.OUT_OF_RANGE,
    errors.SharedMemoryLostError: Code.FAILED_PRECONDITION,
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

# Each refusal names a time of its own, so that those who obey don't come back together.
_PUSHBACK_MS = (500, 1500)

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
    if isinstance(error, MemoryError):
        return STATUS[errors.OverloadedError]
    return status_of(type(error)) if isinstance(error, errors.LayertapError) else Code.INTERNAL


def leaving(error: Exception, *, to_owner: bool = False) -> errors.LayertapError:
    """Return the error as it may leave the server.

    Domain errors carry their own text, except for those that speak of the operator's files.
    Anything else is an InternalError. What the text leaves out is in the log, and in the operator's
    traces where there are any, under the request's id, which it names. Call it where the error is
    being handled.

    Args:
        error: What was raised.
        to_owner: Whether whoever asked may read of the operator's files.
    """
    request = current_request()
    request_id = request.id if request else "an unnamed request"
    if isinstance(error, _PRIVATE) and not to_owner:
        _log.error("request %s failed: %s", request_id, error)
        return type(error)(f"the server could not do it; its log has the reason as {request_id}")
    if isinstance(error, errors.LayertapError):
        text = str(error)
        short = _short(text)
        return error if short == text else type(error)(short)
    if isinstance(error, MemoryError):  # It may be gone when less is going on.
        _log.warning("request %s failed: out of memory", request_id)
        text = "the server is out of memory; try again later, or ask for less"
        return errors.OverloadedError(text)
    _log.exception("request %s failed", request_id)
    return errors.InternalError(f"internal error; the server's log has it as {request_id}")


def guarded(handler: Handler, *, to_owner: bool = False) -> Handler:
    """Wrap a handler so that whatever it raises becomes a status, as ``leaving`` says."""

    def handle(message: bytes, context: grpc.ServicerContext) -> bytes:
        request = open_request(context)
        try:
            compress_replies(context)
            return handler(message, context)
        except Exception as error:  # noqa: BLE001 - the last line of defence; it is logged in full
            _abort(context, leaving(error, to_owner=to_owner), request)

    return handle


def guarded_stream(handler: StreamHandler) -> StreamHandler:
    """Wrap the handler of a stream in the same way."""

    def handle(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        request = open_request(context)
        try:
            compress_replies(context)
            yield from handler(messages, context)
        except Exception as error:  # noqa: BLE001 - as above
            _abort(context, leaving(error), request)

    return handle


def _abort(
    context: grpc.ServicerContext, error: errors.LayertapError, request: Request
) -> NoReturn:
    names = [(ERROR_METADATA_KEY, type(error).__name__), (REQUEST_ID_KEY, request.id)]
    if isinstance(error, errors.OverloadedError):
        names.append((PUSHBACK_METADATA_KEY, str(random.randint(*_PUSHBACK_MS))))
    context.set_trailing_metadata(tuple(names))
    context.abort(status_of(type(error)), str(error))
    raise AssertionError("abort always raises")


def _short(text: str) -> str:
    """Return as much of a text as travels."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= _TEXT_BYTES:
        return text
    return encoded[:_TEXT_BYTES].decode("utf-8", "ignore") + " …"
