"""gRPC's options for a server that takes small requests and sends large replies.

Apart from the server, so that benchmarks/bench_wire.py measures the wire with them and no PyTorch.
"""

from __future__ import annotations

__all__ = ["channel_options"]


def channel_options(request_bytes: int) -> list[tuple[str, int]]:
    """Return them; ``request_bytes`` is the most that one request may have."""
    return [
        # Two servers on one port would each get half of the calls, unnoticed.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", request_bytes),
        # The reply's limit is the engine's to check, before it computes anything.
        ("grpc.max_send_message_length", -1),
    ]
