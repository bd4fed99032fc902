"""The HTTP port: metrics for Prometheus, and probes for orchestrators.

``/metrics`` has the metrics, ``/healthz`` reports whether the process works, and ``/readyz``
whether it serves. It is plain HTTP even if the gRPC port uses TLS, because the probes of Kubernetes
and Docker have neither the server's CA certificate nor a client certificate.

Note [One thread for all connections]
    A probe must always be answered. So connections have no threads of their own, which a thread
    limit could prevent, and no connection waits for another. An event loop reads all connections,
    gives each a few seconds, and closes the oldest if there are too many. It accepts them with
    files that are kept back for it, whatever else uses all others. A second thread renders the
    metrics, because they wait for the locks of the objects that they report on.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from prometheus_client import CollectorRegistry, make_wsgi_app

from layertap.addresses import host_port
from layertap.errors import UnavailableError
from layertap.resources import spare_files

__all__ = ["HttpPage"]

HEADER_BYTES = 8192
"""Maximum size of a request in bytes."""

SECONDS = 5.0
"""How long a connection may take to send its request and to read the answer."""

CONNECTIONS = 128
"""Maximum number of open connections by default."""

_ACCEPTED_AT_ONCE = 4
"""How many connections are accepted before the oldest are closed again, if there are too many."""

_TEXT = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class _Answer:
    status: HTTPStatus
    body: bytes
    headers: tuple[tuple[str, str], ...] = (("Content-Type", _TEXT),)

    def encode(self, *, body: bool) -> bytes:
        """Return the answer as bytes; without a body if only the head was requested."""
        lines = [f"HTTP/1.1 {self.status.value} {self.status.phrase}"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        lines += [f"Content-Length: {len(self.body)}", "Connection: close", "", ""]
        return "\r\n".join(lines).encode("latin-1") + (self.body if body else b"")


class HttpPage:
    """Serves ``/metrics``, ``/healthz`` and ``/readyz`` until it is closed.

    Args:
        registry: The metrics to show.
        host: The address to bind.
        port: The port; 0 for a free one.
        alive: Returns whether the server works. Called for ``/healthz`` in the page's thread.
        ready: Returns whether the server serves requests. Called for ``/readyz`` in that thread.
        connections: Maximum number of open connections; a further one closes the oldest.

    Attributes:
        url: The URL of the metrics.

    Raises:
        UnavailableError: If the address can't be bound.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str,
        port: int,
        *,
        alive: Callable[[], bool],
        ready: Callable[[], bool],
        connections: int = CONNECTIONS,
    ) -> None:
        self._alive, self._ready = alive, ready
        self._most = connections
        self._metrics = make_wsgi_app(registry)
        self._listener = _listen(host, port)
        self.url = f"http://{host_port(host, self._listener.getsockname()[1])}/metrics"
        self._connections: dict[asyncio.Task[None], None] = {}
        self._renderer = ThreadPoolExecutor(1, thread_name_prefix="layertap-metrics")
        # Started now, while the system still allows threads.
        self._renderer.submit(lambda: None).result()
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="layertap-http", daemon=True
        )
        self._thread.start()
        started.wait()

    def close(self) -> None:
        """Close all connections and free the port."""
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self._renderer.shutdown()

    def _run(self, started: threading.Event) -> None:
        try:
            self._loop.run_until_complete(self._serve(started))
        finally:
            self._loop.close()

    async def _serve(self, started: threading.Event) -> None:
        server = await asyncio.start_server(
            self._connected, sock=self._listener, limit=HEADER_BYTES, backlog=_ACCEPTED_AT_ONCE
        )
        # For asyncio this number is also the length of the queue, which may be longer.
        self._listener.listen(CONNECTIONS)
        started.set()
        await self._ended.wait()
        server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - asyncio runs this in a task
        if len(self._connections) >= self._most:
            # Removed at once, so that the next connection closes another one.
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.cancel()
        self._connections[task] = None
        try:
            # The peer has left, the peer is too slow, or the page is closing.
            with suppress(OSError, TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(SECONDS):
                    writer.write(await self._reply(reader))
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
        finally:
            self._connections.pop(task, None)
            writer.transport.abort()

    async def _reply(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.LimitOverrunError:
            return _plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE).encode(body=True)
        except asyncio.IncompleteReadError:
            return b""
        line, *rest = head.split("\r\n")
        parts = line.split(" ")
        if len(parts) != 3 or not parts[2].startswith("HTTP/"):
            return _plain(HTTPStatus.BAD_REQUEST).encode(body=True)
        method, target, _ = parts
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (each.partition(":") for each in rest)
        }
        answer = await self._answer(method, target, headers)
        return answer.encode(body=method != "HEAD")

    async def _answer(self, method: str, target: str, headers: dict[str, str]) -> _Answer:
        path, _, query = target.partition("?")
        if path not in ("/metrics", "/healthz", "/readyz"):
            return _plain(HTTPStatus.NOT_FOUND)
        if method not in ("GET", "HEAD"):
            return _plain(HTTPStatus.METHOD_NOT_ALLOWED, ("Allow", "GET, HEAD"))
        if path == "/healthz":
            return _plain(HTTPStatus.OK if self._alive() else HTTPStatus.SERVICE_UNAVAILABLE)
        if path == "/readyz":
            return _plain(HTTPStatus.OK if self._ready() else HTTPStatus.SERVICE_UNAVAILABLE)
        return await self._loop.run_in_executor(self._renderer, self._render, query, headers)

    def _render(self, query: str, headers: dict[str, str]) -> _Answer:
        """Return the metrics in a format and encoding that the request accepts."""
        told: list[Any] = []
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": "/metrics",
            "QUERY_STRING": query,
            "HTTP_ACCEPT": headers.get("accept", ""),
            "HTTP_ACCEPT_ENCODING": headers.get("accept-encoding", ""),
        }
        body = b"".join(self._metrics(environ, lambda *args: told.extend(args)))
        status, fields = told
        return _Answer(HTTPStatus(int(status.split()[0])), body, tuple(fields))


def _plain(status: HTTPStatus, *headers: tuple[str, str]) -> _Answer:
    text = "ok" if status is HTTPStatus.OK else status.phrase.lower()
    return _Answer(status, f"{text}\n".encode("ascii"), (("Content-Type", _TEXT), *headers))


class _Listener(socket.socket):
    """Accepts connections even if all files that the process may have open are in use."""

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection, with a spare file if there is no other."""
        try:
            return super().accept()
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
        with spare_files():
            return super().accept()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return _Listener(fileno=socket.create_server(address[:2], family=family).detach())
    except OSError as error:
        raise UnavailableError(
            f"can't show metrics on {host_port(host, port)}: {error.strerror}; choose another "
            f"with --metrics-port, or -1 for none"
        ) from error
