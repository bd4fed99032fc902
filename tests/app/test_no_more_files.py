"""A server whose callers use as many files as they can still answers, and its probes do too."""

from __future__ import annotations

import http.client
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from layertap import Client
from processes import Serving

FILES = 256
ARGS = ("--port", "0", "--metrics-port", "0", "--plan-cache", "off", "--item-shape", "3,32,32")


@pytest.fixture
def server() -> Iterator[Serving]:
    """A server that may have so many files open."""
    prefix = ("sh", "-c", f'ulimit -n {FILES}; exec "$@"', "sh")
    server = Serving(["tinynets:residual", *ARGS], prefix=prefix)
    yield server
    server.close()


@pytest.fixture
def room() -> Iterator[None]:
    """Room for this process's own ends of so many connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8 * FILES)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def probe(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def files_of(server: Serving) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


@pytest.mark.long
@pytest.mark.usefixtures("room")
def test_no_caller_uses_up_the_files_of_others(server: Serving) -> None:
    """Clients that keep shared memory and silent connections together leave files for probes."""
    grpc_port = int(server.address.rpartition(":")[2])
    http_port = int(server.line(r"metrics on http://.*:(\d+)/metrics$")[1])
    before = files_of(server)
    x = np.random.default_rng(0).random((48, 3, 32, 32), np.float32)
    with ExitStack() as closing:
        kept = []
        for _ in range(2):
            client = closing.enter_context(Client(server.address, timeout=60))
            kept += [client.extract("residual", x, "layer1", extractor="hook") for _ in range(70)]
        assert files_of(server) >= before + 28  # The memory of as many of the values as allowed.
        for port in [grpc_port] * 2 * FILES + [http_port] * FILES:
            peer = closing.enter_context(socket.socket())
            peer.settimeout(5)
            peer.connect(("127.0.0.1", port))
        for path in ("/healthz", "/readyz", "/metrics"):
            assert probe(http_port, path) == 200
        # What the server keeps for itself is still there, besides what it began with.
        assert files_of(server) - before <= (FILES - FILES // 8) * 7 // 8
        assert all(np.array_equal(each["layer1"], kept[0]["layer1"]) for each in kept)
    with Client(server.address, timeout=60) as client:
        again = client.extract("residual", x, "layer1", extractor="hook")
        np.testing.assert_array_equal(again["layer1"], kept[0]["layer1"])
