"""How gRPC handlers report errors: as which gRPC status, and with which text."""

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

# Their texts name the operator's files and quote the model's own code.
_PRIVATE = (errors.ConfigError, errors.ModelLoadError)

# The text is sent in a header, where each byte may take three, and a gRPC client accepts 8 KiB of
# headers by default. If the text were longer, the client would see another error instead. Texts
# quote requests, so they can be long.
_TEXT_BYTES = 2048

# Each refusal gives a random time, so that clients that respect it don't retry together.
_PUSHBACK_MS = (500, 1500)

Handler = Callable[[bytes, grpc.ServicerContext], bytes]
StreamHandler = Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]


def public_error(error: Exception, *, to_owner: bool = False) -> errors.LayertapError:
    """Return the error as it may leave the server. Call this while the error is being handled.

    Domain errors keep their text, except for those about the operator's files. Any other error
    becomes an InternalError. The new text names the request's id, under which the log (and the
    operator's traces, if there are any) has the original error.

    Args:
        error: The error that was raised.
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
    if isinstance(error, MemoryError):  # A retry may succeed once less memory is in use.
        _log.warning("request %s failed: out of memory", request_id)
        text = "the server is out of memory; try again later, or request less"
        return errors.OverloadedError(text)
    _log.exception("request %s failed", request_id)
    return errors.InternalError(f"internal error; see the server's log for request {request_id}")


def guarded(handler: Handler, *, to_owner: bool = False) -> Handler:
    """Wrap a handler so that each of its exceptions becomes a status; see ``public_error``."""

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
    """Return an error of the same class, with the same fields and another text."""
    changed = type(error)(text)
    changed.__dict__.update(error.__dict__)
    return changed


def _short(text: str) -> str:
    """Return a text, shortened to the limit for error messages."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= _TEXT_BYTES:
        return text
    return encoded[:_TEXT_BYTES].decode("utf-8", "ignore") + " …"
