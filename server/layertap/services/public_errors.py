"""What callers may read of an error; the rest is in the server's log."""

from __future__ import annotations

import logging

from layertap import errors
from layertap.services.caller import current_caller

__all__ = ["public_error"]

_log = logging.getLogger(__name__)

# Of the operator's side, whose texts name files and hold what a model's own code says.
_PRIVATE = (errors.ConfigError, errors.ModelLoadError)

# A text travels in a header, each byte of it as up to three, and a client's gRPC takes 8 KiB of
# headers by default: a longer one would replace the error by another. Requests are quoted in it.
_TEXT_BYTES = 2048


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
    caller = current_caller()
    request_id = caller.request_id if caller else "an unnamed request"
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
