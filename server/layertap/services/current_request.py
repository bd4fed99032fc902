"""The request that a thread works for, and its id in log records.

The id travels in a context variable, which the engine carries over to its compute threads, so that
code that logs there needs to know nothing about requests.
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
"""The metadata that takes an id in, and the trailing metadata that hands it back."""

# It goes into logs, traces and error texts, and any caller may have written it: no space, no quote,
# nothing that a terminal or a page would act on. UUIDs, ULIDs and the ids of load balancers pass.
_SANE = re.compile(r"[A-Za-z0-9_.:/+=@-]{1,64}")

# Unique among processes and restarts, but easy to guess: it protects nothing.
_OURS = secrets.token_hex(4)
_numbers = itertools.count(secrets.randbits(24))

_current: ContextVar[Request | None] = ContextVar("layertap_request", default=None)


@dataclass(slots=True)
class Request:
    """One call of an RPC.

    Attributes:
        id: The caller's ``x-request-id`` if it is sane, else one of our own.
        started_ns: When it reached its handler, by ``time.perf_counter_ns``.
    """

    id: str
    started_ns: int


def current_request() -> Request | None:
    """Return the request that this thread works for; None if it works for none."""
    return _current.get()


def open_request(context: grpc.ServicerContext) -> Request:
    """Give a call its id, and return the id in the trailing metadata.

    There is nothing to close: gRPC runs each call in a ``contextvars.Context`` of its own.
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
