"""The sender of a request, as the layers below the transports see it.

The adapter of each transport makes a ``Caller`` for each call; gRPC's adapter does so in
``layertap.services.grpc_adapter.caller``. A context variable holds the caller that a thread works
for. The engine copies it to its compute threads, so that log records there name the request,
although the code that logs knows nothing about requests.
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Hashable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from layertap.call import Call

__all__ = ["REQUEST_ID_KEY", "Caller", "current_caller", "request_id_from", "set_current_caller"]

REQUEST_ID_KEY = "x-request-id"
"""The header in which a caller may name its request, and in which the server returns that name."""

# Any caller may write the id, and it goes into logs, traces and error messages. So it may have no
# spaces, quotes, or characters that a terminal or a web page interprets. UUIDs, ULIDs and the ids
# of load balancers match.
_SANE = re.compile(r"[A-Za-z0-9_.:/+=@-]{1,64}")

# Unique among processes and restarts, but easy to guess: nothing may rely on its secrecy.
_OURS = secrets.token_hex(4)
_numbers = itertools.count(secrets.randbits(24))

_current: ContextVar[Caller | None] = ContextVar("layertap_caller", default=None)


def request_id_from(given: Iterable[object] = ()) -> str:
    """Return the first well-formed id that a caller gave its request, or else a new id.

    Args:
        given: The values of ``x-request-id``, which may be anything.
    """
    for value in given:
        if isinstance(value, str) and _SANE.fullmatch(value):
            return value
    return f"{_OURS}{next(_numbers):08x}"


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of one request. Safe to share between threads.

    Each item of a stream has its own caller, because it has its own deadline.

    Attributes:
        call: Whether the caller still waits for the reply, and for how long.
        request_id: The request's id in logs, traces and errors; an item has that of its stream.
        transport: How the request arrived, such as ``"grpc"``; empty if without a transport.
        peer: The caller's address, as the transport writes it.
        local: Whether the caller runs on this machine. No other caller may share memory.
        identity: Equal for callers with the same credentials, which therefore have the same shared
            memory. Never shown to anyone.
        trace_context: The headers ``traceparent`` and ``tracestate``, if the caller sent them.
        in_stream: Whether the request is an item of a stream.
    """

    call: Call = field(default_factory=Call)
    request_id: str = field(default_factory=request_id_from)
    transport: str = ""
    peer: str = ""
    local: bool = False
    identity: Hashable = field(default=None, repr=False)
    trace_context: Mapping[str, str] = field(default_factory=dict)
    in_stream: bool = False

    def of_item(self, timeout: float | None = None) -> Caller:
        """Return the caller of an item of this caller's stream; call this when it is received.

        Args:
            timeout: Seconds that the item may take; None for as long as its stream may go on. The
                end of the stream ends the item in any case.
        """
        call = Call(self.call.remaining())
        if timeout is not None:
            call.limit(timeout)
        return replace(self, call=call, in_stream=True)


def current_caller() -> Caller | None:
    """Return the caller that this thread works for; None if there is none."""
    return _current.get()


def set_current_caller(caller: Caller) -> None:
    """Set the caller that this thread works for, until its ``contextvars.Context`` ends."""
    _current.set(caller)
