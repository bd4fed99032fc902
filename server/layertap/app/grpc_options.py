"""gRPC's options for a server that receives small requests and sends large replies.

They are not in server.py, so that benchmarks/bench_wire.py can use them without PyTorch.

Sources: gRPC's doc/keepalive.md for the pings, its channel_arg_names.h for the others.
"""

from __future__ import annotations

__all__ = ["METADATA_BYTES", "STREAMS", "channel_options"]

STREAMS = 256
"""Maximum number of concurrent calls on one connection; the client queues further calls.

This is far above the limit of the engine's own queue, so that the engine refuses calls with its own
message. Each call may keep 64 KiB of a message that is not read yet. gRPC's default is no limit.
"""

METADATA_BYTES = 16 * 1024
"""Maximum bytes of one call's metadata; a token or a trace context takes one or two thousand."""


def channel_options(
    request_bytes: int,
    streams: int = STREAMS,
    age_seconds: float = 0.0,
    age_grace_seconds: float = 0.0,
    connections: int = 0,
) -> list[tuple[str, int]]:
    """Return gRPC's channel arguments for a server.

    Args:
        request_bytes: Maximum size of a request message.
        streams: Maximum number of concurrent calls on one connection.
        age_seconds: How long a connection lasts, give or take a tenth; 0 for no limit.
        age_grace_seconds: How long its calls may then take to finish; 0 for no limit.
        connections: Maximum number of open connections; further ones are closed; 0 for no limit.
    """
    return [
        # Two servers on one port would each get half of the calls, without anyone noticing.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", request_bytes),
        # The engine checks the limit of replies, before it computes anything.
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
    """Return the option; nothing for 0, because gRPC's default is no limit."""
    return ((name, min(max(1, round(seconds * 1000)), _MOST)),) if seconds else ()


_MOST = 2**31 - 1  # gRPC's options are 32-bit integers; the largest value means no limit.


# Between these two sizes, gRPC refuses calls at random, the larger the likelier. Equal sizes make
# this a fixed limit: the same call is always accepted or always refused with RESOURCE_EXHAUSTED.
_METADATA = (
    ("grpc.max_metadata_size", METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", METADATA_BYTES),
)

_KEEPALIVE = (
    # A client that waits for a long forward pass, or is idle, may ping so that no router forgets
    # the connection. By default gRPC closes the connection with ENHANCE_YOUR_CALM if pings come
    # more often than every 5 minutes, or every 2 hours while no call is in progress.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # gRPC's default, stated explicitly: a third ping that comes too early closes the connection.
    ("grpc.http2.max_ping_strikes", 2),
    # The server's own pings detect that a client's machine is gone, after 5 minutes instead of 2
    # hours. They also keep idle connections alive in routers, which drop them after about as long.
    ("grpc.keepalive_time_ms", 300_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)

_CONNECTIONS = (
    # A client that connects and sends nothing holds a socket this long; the default is 2 minutes.
    ("grpc.server_handshake_timeout_ms", 20_000),
)
