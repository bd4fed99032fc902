"""The request that a thread works for, and its id in log records.

The id is kept in a context variable, which the engine copies to its compute threads. So code that
logs there needs to know nothing about requests.
"""

from __future__ import annotations

import itertools
import re
import secrets
import time
from contextvars import ContextVar
from dataclasses import dataclass

import grpc

__all__ = ["REQUEST_ID_KEY", "Request", "current_request", "open_request"]

REQUEST_ID_KEY = "x-request-id"
"""The key of the metadata with the caller's id, and of the trailing metadata with the id used."""

# Any caller may write the id, and it goes into logs, traces and error messages. So it may have no
# spaces, quotes, or characters that a terminal or a web page interprets. UUIDs, ULIDs and the ids
# of load balancers match.
_SANE = re.compile(r"[A-Za-z0-9_.:/+=@-]{1,64}")

# Unique among processes and restarts, but easy to guess: nothing may rely on its secrecy.
_OURS = secrets.token_hex(4)
_numbers = itertools.count(secrets.randbits(24))

_current: ContextVar[Request | None] = ContextVar("layertap_request", default=None)


@dataclass(slots=True)
class Request:
    """One call of an RPC.

    Attributes:
        id: The caller's ``x-request-id`` if it is well-formed, else a new id.
        started_ns: When the call reached its handler, by ``time.perf_counter_ns``.
    """

    id: str
    started_ns: int


def current_request() -> Request | None:
    """Return the request that this thread works for; None if there is none."""
    return _current.get()


def open_request(context: grpc.ServicerContext) -> Request:
    """Give a call its id, and put the id into the trailing metadata.

    This needs no closing: gRPC runs each call in its own ``contextvars.Context``.
    """
    request = Request(_id_of(context), time.perf_counter_ns())
    context.set_trailing_metadata(((REQUEST_ID_KEY, request.id),))
    _current.set(request)
    return request


def _id_of(context: grpc.ServicerContext) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _SANE.fullmatch(value):
            return value
    return f"{_OURS}{next(_numbers):08x}"
