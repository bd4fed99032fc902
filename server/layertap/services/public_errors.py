"""Limits what callers may read about an error; the rest is in the server's log."""

from __future__ import annotations

import logging

from layertap import errors
from layertap.services.caller import current_caller

__all__ = ["public_error"]

_log = logging.getLogger(__name__)

# Their texts name the operator's files and quote the model's own code.
_PRIVATE = (errors.ConfigError, errors.ModelLoadError)

# The text is sent in a header, where each byte may take three, and a gRPC client accepts 8 KiB of
# headers by default. If the text were longer, the client would see another error instead. Texts
# quote requests, so they can be long.
_TEXT_BYTES = 2048


def public_error(error: Exception, *, to_owner: bool = False) -> errors.LayertapError:
    """Return the error as it may leave the server. Call this while the error is being handled.

    Domain errors keep their text, except for those about the operator's files. Any other error
    becomes an InternalError. The new text names the request's id, under which the log (and the
    operator's traces, if there are any) has the original error.

    Args:
        error: The error that was raised.
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
    if isinstance(error, MemoryError):  # A retry may succeed once less memory is in use.
        _log.warning("request %s failed: out of memory", request_id)
        text = "the server is out of memory; try again later, or request less"
        return errors.OverloadedError(text)
    _log.exception("request %s failed", request_id)
    return errors.InternalError(f"internal error; see the server's log for request {request_id}")


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
