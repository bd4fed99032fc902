"""Makes the caller of an RPC from gRPC's context."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence

import grpc

from layertap.call import Call
from layertap.services.caller import (
    REQUEST_ID_KEY,
    Caller,
    current_caller,
    request_id_from,
    set_current_caller,
)

__all__ = ["caller_from", "caller_of"]

_LOCAL_PEERS = ("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:")
_TRACE_KEYS = ("traceparent", "tracestate")


def caller_of(context: grpc.ServicerContext) -> Caller:
    """Return the caller of the RPC that this thread serves.

    The first call, from an interceptor or the handler, makes it, and puts the id of the request
    into the trailing metadata. Further calls return the same object. This needs no closing: gRPC
    runs each RPC in its own ``contextvars.Context``.
    """
    caller = current_caller()
    if caller is None:
        caller = _new_caller(context)
        context.set_trailing_metadata(((REQUEST_ID_KEY, caller.request_id),))
        set_current_caller(caller)
    return caller


def _new_caller(context: grpc.ServicerContext) -> Caller:
    metadata = context.invocation_metadata() or ()
    call = Call(context.time_remaining())
    # If this is False, the RPC has already ended, and gRPC will not call the callback.
    if not context.add_callback(call.cancel):
        call.cancel()
    peer = context.peer()
    return caller_from(
        metadata,
        call,
        transport="grpc",
        peer=peer,
        local=peer.startswith(_LOCAL_PEERS),
        peer_identities=context.peer_identities(),
    )


def caller_from(
    metadata: Sequence[tuple[str, str | bytes]],
    call: Call,
    *,
    transport: str,
    peer: str,
    local: bool,
    peer_identities: Iterable[bytes] | None,
) -> Caller:
    """Return the caller with the request id, the credentials and the trace of its metadata.

    Args:
        metadata: The metadata that it sent.
        call: Its deadline, and whether it still waits.
        transport: How the request arrived.
        peer: Its address.
        local: Whether it runs on this machine.
        peer_identities: The names in its certificate; None or empty if it has none.
    """
    return Caller(
        call=call,
        request_id=request_id_from(value for key, value in metadata if key == REQUEST_ID_KEY),
        transport=transport,
        peer=peer,
        local=local,
        identity=_identity(metadata, peer_identities),
        trace_context={
            key: value for key, value in metadata if key in _TRACE_KEYS and isinstance(value, str)
        },
    )


def _identity(
    metadata: Sequence[tuple[str, object]], peer_identities: Iterable[bytes] | None
) -> Hashable:
    """Return a value that identifies the caller's token and certificate, if it has them.

    It is the same for all callers that have neither. The token itself is not kept.
    """
    tokens = [str(value) for key, value in metadata if key == "authorization"]
    secret = hashlib.sha256("\0".join(tokens).encode("utf-8", "surrogateescape")).digest()
    return secret, tuple(peer_identities or ())
