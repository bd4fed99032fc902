"""The HTTP port answers probes and Prometheus, whatever other clients do."""

from __future__ import annotations

import gzip
import http.client
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily

from layertap.app import http_page
from layertap.app.http_page import CONNECTIONS, HEADER_BYTES, HttpPage
from layertap.errors import UnavailableError
from processes import Serving


class Probed:
    """A page, and the server whose state it shows."""

    def __init__(self) -> None:
        self.alive = self.ready = True
        self.registry = CollectorRegistry()
        Counter("asked", "Questions.", registry=self.registry).inc(3)
        self.page = HttpPage(
            self.registry, "127.0.0.1", 0, alive=lambda: self.alive, ready=lambda: self.ready
        )
        self.port = urlsplit(self.page.url).port or 0

    def ask(
        self, path: str, method: str = "GET", headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, headers=headers or {})
            reply = connection.getresponse()
            return reply.status, reply.read(), reply.headers
        finally:
            connection.close()

    def say(self, request: bytes) -> bytes:
        """Send bytes and return everything that is received."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as peer:
            peer.sendall(request)
            peer.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: peer.recv(65536), b""))


@pytest.fixture
def probed() -> Iterator[Probed]:
    probed = Probed()
    yield probed
    probed.page.close()


def test_probes_tell_the_state(probed: Probed) -> None:
    """/healthz says whether the server works, /readyz whether it serves; each is 200 or 503."""
    assert probed.ask("/healthz")[:2] == (200, b"ok\n")
    assert probed.ask("/readyz?verbose")[:2] == (200, b"ok\n")
    probed.ready = False
    assert (probed.ask("/healthz")[0], probed.ask("/readyz")[0]) == (200, 503)
    probed.alive = False
    assert probed.ask("/healthz")[:2] == (503, b"service unavailable\n")


def test_metrics_come_as_they_are_asked_for(probed: Probed) -> None:
    """The page comes as text or OpenMetrics, compressed or not, and with selected metrics only."""
    status, body, headers = probed.ask("/metrics")
    assert (status, b"asked_total 3.0\n" in body) == (200, True)
    assert headers["Content-Type"].startswith("text/plain")
    _, body, headers = probed.ask("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    _, body, headers = probed.ask("/metrics", headers={"Accept-Encoding": "gzip"})
    assert headers["Content-Encoding"] == "gzip"
    assert b"asked_total 3.0\n" in gzip.decompress(body)
    assert b"asked_total" not in probed.ask("/metrics?name[]=another")[1]


@pytest.mark.parametrize("path", ["/", "/metrics/", "/metricsx", "/healthz/x", "/favicon.ico", "*"])
def test_other_paths_are_not_found(probed: Probed, path: str) -> None:
    """Only the three documented paths exist."""
    assert probed.ask(path)[0] == 404


def test_only_reading_is_allowed(probed: Probed) -> None:
    """HEAD returns the headers without a body; writing methods get 405 and the allowed methods."""
    status, body, headers = probed.ask("/metrics", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 0
    status, _, headers = probed.ask("/healthz", "POST")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    ("request_", "begins"),
    [
        (b"rubbish\r\n\r\n", b"HTTP/1.1 400 "),
        (b"\xff\xfe\x00\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET /" + b"x" * HEADER_BYTES * 2, b"HTTP/1.1 431 "),
        (b"GET /healthz HTTP/1.1\r\n", b""),
        (b"", b""),
    ],
)
def test_malformed_requests_end_themselves_only(
    probed: Probed, request_: bytes, begins: bytes
) -> None:
    """Bytes that are not a request are refused, and the next request is answered."""
    assert probed.say(request_).startswith(begins)
    assert probed.ask("/healthz")[0] == 200


def test_silent_connections_hold_nobody_up(probed: Probed) -> None:
    """With all places taken by silent connections, a probe is answered at once."""
    with ExitStack() as closing:
        for _ in range(4 * CONNECTIONS):
            peer = socket.create_connection(("127.0.0.1", probed.port), timeout=10)
            closing.enter_context(peer)
            assert len(probed.page._connections) <= CONNECTIONS
        begun = time.monotonic()
        assert probed.ask("/healthz")[0] == 200
        assert time.monotonic() - begun < 2


def test_probes_are_answered_when_no_file_can_be_opened() -> None:
    """A page in a process that has all its files in use still answers every probe."""
    program = (
        "import os, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from prometheus_client import CollectorRegistry\n"
        "from layertap.app.http_page import HttpPage\n"
        "from layertap.resources import raise_file_limit\n"
        "raise_file_limit()\n"
        "page = HttpPage(CollectorRegistry(), '127.0.0.1', 0, alive=bool, ready=lambda: True)\n"
        "try:\n"
        "    while True:\n"
        "        os.open('/dev/null', os.O_RDONLY)\n"
        "except OSError:\n"
        "    print(page.url, flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = urlsplit(process.stdout.readline()).port or 0
        for path, want in [("/readyz", 200), ("/healthz", 503), ("/metrics", 200)] * 20:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", path)
            assert connection.getresponse().status == want
            connection.close()
        process.stdin.close()


def test_a_slow_connection_is_ended(monkeypatch: pytest.MonkeyPatch, probed: Probed) -> None:
    """A connection that doesn't finish its request is closed after some seconds."""
    monkeypatch.setattr(http_page, "SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", probed.port), timeout=10) as peer:
        peer.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert peer.recv(1) == b""


def test_a_metric_that_waits_holds_no_probe_up(probed: Probed) -> None:
    """While a collector waits for a lock, probes are answered."""
    entered, go_on = threading.Event(), threading.Event()

    class Waits:
        def collect(self) -> Iterator[GaugeMetricFamily]:
            entered.set()
            go_on.wait(20)
            yield GaugeMetricFamily("late", "Comes late.", value=1)

    go_on.set()  # The registry collects once when it registers.
    probed.registry.register(Waits())
    entered.clear()
    go_on.clear()
    bodies: list[bytes] = []
    asking = threading.Thread(target=lambda: bodies.append(probed.ask("/metrics")[1]))
    asking.start()
    assert entered.wait(10)
    assert probed.ask("/healthz")[0] == 200
    go_on.set()
    asking.join()
    assert b"late 1.0\n" in bodies[0]


def test_a_taken_port_is_told_and_freed(probed: Probed) -> None:
    """A port in use is an error that names the flag; closing the page frees its port."""
    with pytest.raises(UnavailableError, match="--metrics-port"):
        HttpPage(probed.registry, "127.0.0.1", probed.port, alive=bool, ready=bool)
    other = HttpPage(probed.registry, "localhost", 0, alive=bool, ready=bool)
    port = urlsplit(other.url).port or 0
    other.close()
    HttpPage(probed.registry, "localhost", port, alive=bool, ready=bool).close()


def test_a_server_is_not_ready_until_its_models_are() -> None:
    """A real server is alive from the start, and ready once its models are loaded."""
    args = [
        "slownets:loads_slowly",
        "--item-shape",
        "3,4,4",
        "--port",
        "0",
        "--metrics-port",
        "0",
        "--plan-cache",
        "off",
    ]
    server = Serving(args, fresh=False)
    try:
        port = urlsplit(server.line(r"metrics on (\S+)$")[1]).port or 0

        def status(path: str) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", path)
            code = connection.getresponse().status
            connection.close()
            return code

        assert (status("/readyz"), status("/healthz"), status("/")) == (503, 200, 404)
        assert server.address
        assert (status("/readyz"), status("/healthz")) == (200, 200)
    finally:
        server.close()
