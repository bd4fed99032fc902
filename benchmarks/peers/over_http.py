"""A connection that stays open, for the peers that speak HTTP."""

from __future__ import annotations

import http.client
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Send", "free_port", "post", "wait_for"]

Send = Callable[[str, bytes], bytes]
"""Takes a path and a body, returns the body of the response."""


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(address: str, path: str, seconds: float = 600) -> None:
    """Wait until a path answers with 200."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        connection = http.client.HTTPConnection(address, timeout=5)
        try:
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass  # It does not listen yet.
        finally:
            connection.close()
        time.sleep(0.2)
    raise SystemExit(f"{address}{path} did not answer within {seconds:.0f} s")


@contextmanager
def post(address: str) -> Iterator[Send]:
    """Yield what sends a body and returns that of the response."""
    connection = http.client.HTTPConnection(address, timeout=120)

    def connect() -> None:
        connection.close()
        connection.connect()
        # Without it, the kernel waits for more to send with a small request's last part.
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(path: str, body: bytes) -> bytes:
        # uvicorn closes a connection on which nothing came for five seconds.
        if connection.sock is None or select.select([connection.sock], [], [], 0)[0]:
            connect()
        connection.request("POST", path, body, {"Content-Type": "application/octet-stream"})
        response = connection.getresponse()
        data = response.read()
        if response.status != 200:
            raise SystemExit(f"{address}{path}: {response.status} {data[:200]!r}")
        return data

    connect()
    try:
        yield send
    finally:
        connection.close()
