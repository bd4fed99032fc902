"""gRPC's options for a server that takes small requests and sends large replies.

Apart from the server, so that benchmarks/bench_wire.py measures the wire with them and no PyTorch.

Sources: gRPC's doc/keepalive.md for the pings, its channel_arg_names.h for the rest.
"""

from __future__ import annotations

__all__ = ["METADATA_BYTES", "STREAMS", "channel_options"]

STREAMS = 256
"""The most concurrent calls on one connection; the client queues further calls.

Far above what the engine's own queue takes, so that this one refuses, with its own words. Each may
keep 64 KiB of a message that is not read yet; by default there is no limit.
"""

METADATA_BYTES = 16 * 1024
"""Bytes of one call's metadata: a token or a trace's context takes one or two thousand."""


def channel_options(
    request_bytes: int,
    streams: int = STREAMS,
    age_seconds: float = 0.0,
    age_grace_seconds: float = 0.0,
    connections: int = 0,
) -> list[tuple[str, int]]:
    """Return them.

    Args:
        request_bytes: The most that one request may have.
        streams: Calls that one connection may have under way.
        age_seconds: How long a connection lasts, give or take a tenth; 0 for no limit.
        age_grace_seconds: How long its calls may then take to finish; 0 for no limit.
        connections: Connections that may be open at once, one more is closed; 0 for no limit.
    """
    return [
        # Two servers on one port would each get half of the calls, unnoticed.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", request_bytes),
        # The reply's limit is the engine's to check, before it computes anything.
        ("grpc.max_send_message_length", -1),
        *_METADATA,
        *_KEEPALIVE,
        ("grpc.max_concurrent_streams", streams),
        *([("grpc.max_allowed_incoming_connections", connections)] if connections else []),
        *_CONNECTIONS,
        *_age("grpc.max_connection_age_ms", age_seconds),
        *_age("grpc.max_connection_age_grace_ms", age_grace_seconds),
    ]


def _age(name: str, seconds: float) -> tuple[tuple[str, int], ...]:
    """Return the option; none without an end, which is gRPC's default."""
    return ((name, min(max(1, round(seconds * 1000)), _MOST)),) if seconds else ()


_MOST = 2**31 - 1  # gRPC's options are integers of 32 bits; this one means no end.


# Between the two gRPC refuses calls at random, more of them the larger they are. Equal ones make it
# a limit: the same call is always taken or always refused, with RESOURCE_EXHAUSTED.
_METADATA = (
    ("grpc.max_metadata_size", METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", METADATA_BYTES),
)

_KEEPALIVE = (
    # A client that waits for a long forward pass, or for its next request, may ping so that no
    # router forgets the connection. By default gRPC ends it with ENHANCE_YOUR_CALM when pings come
    # more often than every 5 minutes, or every 2 hours while no call is under way.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The default, spelt out as the limit that it is: a third ping that comes too early ends it.
    ("grpc.http2.max_ping_strikes", 2),
    # The server's own pings find out that a client's machine is gone, after 5 minutes instead of 2
    # hours, and keep idle connections alive in routers, which forget them after about as long.
    ("grpc.keepalive_time_ms", 300_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)

_CONNECTIONS = (
    # Somebody who connects and says nothing holds a socket for so long; the default is 2 minutes.
    ("grpc.server_handshake_timeout_ms", 20_000),
)
