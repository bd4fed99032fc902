"""How gRPC handlers report errors: the map to gRPC's statuses, and what may leave the server."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from typing import NoReturn

import grpc

from layertap import errors
from layertap.services.compression import compress_replies
from layertap.services.current_request import REQUEST_ID_KEY, Request, current_request, open_request
from layertap.services.error_codes import ErrorCode, code_of
from layertap.wire.messages import (
    ERROR_IMAGE_METADATA_KEY,
    ERROR_METADATA_KEY,
    PUSHBACK_METADATA_KEY,
)

__all__ = [
    "STATUS",
    "guarded",
    "guarded_stream",
    "public_error",
]

_log = logging.getLogger(__name__)

STATUS: dict[ErrorCode, grpc.StatusCode] = {code: grpc.StatusCode[code.name] for code in ErrorCode}
"""gRPC's status for each code."""

# Of the operator's side, whose texts name files and hold what a model's own code says.
_PRIVATE = (errors.ConfigError, errors.ModelLoadError)

# A text travels in a header, each byte of it as up to three, and a client's gRPC takes 8 KiB of
# headers by default: a longer one would replace the error by another. Requests are quoted in it.
_TEXT_BYTES = 2048

# Each refusal names a random time, so that clients that obey don't come back together.
_PUSHBACK_MS = (500, 1500)

Handler = Callable[[bytes, grpc.ServicerContext], bytes]
StreamHandler = Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]


def public_error(error: Exception, *, to_owner: bool = False) -> errors.LayertapError:
    """Return the error as it may leave the server.

    Domain errors carry their own text, except for those that speak of the operator's files.
    Anything else is an InternalError. What the text leaves out is in the log, and in the operator's
    traces where there are any, under the request's id, which it names. Call it where the error is
    being handled.

    Args:
        error: What was raised.
        to_owner: Whether the caller may read about the operator's files.
    """
    request = current_request()
    request_id = request.id if request else "an unnamed request"
    if isinstance(error, _PRIVATE) and not to_owner:
        _log.error("request %s failed: %s", request_id, error)
        return type(error)(
            f"the request failed on the server; see its log for request {request_id}"
        )
    if isinstance(error, errors.LayertapError):
        text = str(error)
        short = _short(text)
        return error if short == text else _with_text(error, short)
    if isinstance(error, MemoryError):  # It may be gone when less is going on.
        _log.warning("request %s failed: out of memory", request_id)
        text = "the server is out of memory; try again later, or request less"
        return errors.OverloadedError(text)
    _log.exception("request %s failed", request_id)
    return errors.InternalError(f"internal error; see the server's log for request {request_id}")


def guarded(handler: Handler, *, to_owner: bool = False) -> Handler:
    """Wrap a handler so that whatever it raises becomes a status, as ``public_error`` says."""

    def handle(message: bytes, context: grpc.ServicerContext) -> bytes:
        request = open_request(context)
        try:
            compress_replies(context)
            return handler(message, context)
        except Exception as error:  # noqa: BLE001 - the last line of defence; it is logged in full
            _abort(context, public_error(error, to_owner=to_owner), request)

    return handle


def guarded_stream(handler: StreamHandler) -> StreamHandler:
    """Wrap the handler of a stream in the same way."""

    def handle(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        request = open_request(context)
        try:
            compress_replies(context)
            yield from handler(messages, context)
        except Exception as error:  # noqa: BLE001 - as above
            _abort(context, public_error(error), request)

    return handle


def _abort(
    context: grpc.ServicerContext, error: errors.LayertapError, request: Request
) -> NoReturn:
    names = [(ERROR_METADATA_KEY, type(error).__name__), (REQUEST_ID_KEY, request.id)]
    if isinstance(error, errors.OverloadedError):
        names.append((PUSHBACK_METADATA_KEY, str(random.randint(*_PUSHBACK_MS))))
    if isinstance(error, errors.InvalidInputError) and error.image is not None:
        names.append((ERROR_IMAGE_METADATA_KEY, str(error.image)))
    context.set_trailing_metadata(tuple(names))
    context.abort(STATUS[code_of(error)], str(error))
    raise AssertionError("abort always raises")


def _with_text(error: errors.LayertapError, text: str) -> errors.LayertapError:
    """Return an error of the same class and with the same fields that says something else."""
    changed = type(error)(text)
    changed.__dict__.update(error.__dict__)
    return changed


def _short(text: str) -> str:
    """Return a text, shortened to the limit for error messages."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= _TEXT_BYTES:
        return text
    return encoded[:_TEXT_BYTES].decode("utf-8", "ignore") + " …"
