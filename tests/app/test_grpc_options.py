"""Metadata is limited, idle clients stay connected, and floods of pings end their connection."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from layertap.app.grpc_options import METADATA_BYTES, channel_options

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7
ACK = 1
ENHANCE_YOUR_CALM = 11


@contextmanager
def echo(**changed: int) -> Iterator[int]:
    """Serve an echo with the server's options, some of them changed, and yield its port."""
    options = {**dict(channel_options(1 << 20)), **changed}
    server = grpc.server(ThreadPoolExecutor(2), options=list(options.items()))
    handler = grpc.unary_unary_rpc_method_handler(lambda message, context: message)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Echo", {"Call": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(0)


@pytest.mark.parametrize("attempt", range(3))
def test_metadata_over_the_limit_is_always_refused(attempt: int) -> None:
    """Too much metadata always gives RESOURCE_EXHAUSTED; less is always answered."""
    with echo() as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/test.Echo/Call")
        fits = (("padding", "x" * (METADATA_BYTES - 1024)),)
        assert call(b"hello", metadata=fits, timeout=30) == b"hello"
        with pytest.raises(grpc.RpcError) as caught:
            call(b"hello", metadata=(("padding", "x" * METADATA_BYTES),), timeout=30)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert call(b"again", timeout=30) == b"again"


class Http2:
    """An HTTP/2 connection without a call, which sends and receives single frames."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._socket.sendall(PREFACE)
        self.send(SETTINGS)

    def send(self, kind: int, payload: bytes = b"", flags: int = 0) -> None:
        head = struct.pack(">I", len(payload))[1:] + bytes((kind, flags))
        self._socket.sendall(head + b"\0\0\0\0" + payload)

    def receive(self) -> tuple[int, int, bytes]:
        """Return the next frame: kind, flags, payload."""
        head = self._read(9)
        return head[3], head[4], self._read(int.from_bytes(head[:3], "big"))

    def next_of(self, *kinds: int) -> tuple[int, bytes]:
        """Return the next frame of one of these kinds: kind, payload."""
        while True:
            kind, _, payload = self.receive()
            if kind in kinds:
                return kind, payload

    def until(self, kind: int, flags: int = 0) -> bytes:
        """Return the payload of the next frame of a kind; fail if the connection ends first."""
        while True:
            got, got_flags, payload = self.receive()
            assert got != GOAWAY or kind == GOAWAY, payload
            if got == kind and got_flags & flags == flags:
                return payload
            if got == SETTINGS and not got_flags & ACK:
                self.send(SETTINGS, flags=ACK)

    def close(self) -> None:
        self._socket.close()

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            assert part, "the server closed the connection"
            data += part
        return data


@contextmanager
def connected(port: int) -> Iterator[Http2]:
    connection = Http2(port)
    try:
        connection.until(SETTINGS, ACK)
        yield connection
    finally:
        connection.close()


def test_a_flood_of_pings_ends_the_connection() -> None:
    """Continuous pings are answered with GOAWAY, and other connections keep working."""
    with echo() as port:
        with connected(port) as client:
            # One after the other: what is still on its way when the server closes is answered with
            # a reset, which could overtake the GOAWAY.
            for _ in range(20):
                client.send(PING, bytes(8))
                kind, goaway = client.next_of(PING, GOAWAY)
                if kind == GOAWAY:
                    break
            assert kind == GOAWAY
        assert int.from_bytes(goaway[4:8], "big") == ENHANCE_YOUR_CALM
        assert goaway[8:] == b"too_many_pings"
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert channel.unary_unary("/test.Echo/Call")(b"x", timeout=30) == b"x"


def test_an_idle_client_may_ping() -> None:
    """A client without a call under way pings at the allowed pace for ever.

    The pace is scaled down; gRPC's default would allow one ping in two hours here.
    """
    pause = threading.Event()
    scaled = {"grpc.http2.min_ping_interval_without_data_ms": 20}
    with echo(**scaled) as port, connected(port) as client:
        for number in range(8):
            payload = struct.pack(">Q", number)
            client.send(PING, payload)
            assert client.until(PING, ACK) == payload
            pause.wait(0.1)


def test_clients_may_ping_as_often_as_the_documentation_says() -> None:
    """The interval that docs/security.md promises to clients is the server's."""
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text("utf-8")
    milliseconds = dict(channel_options(1))["grpc.http2.min_ping_interval_without_data_ms"]
    assert f"every {milliseconds // 1000} seconds" in text
    assert f"{METADATA_BYTES // 1024} KiB" in text


def test_one_connection_too_many_is_closed() -> None:
    """Above the limit a connection is closed at once; a connection that ends makes room."""
    with echo(**{"grpc.max_allowed_incoming_connections": 3}) as port:
        peers = [Http2(port) for _ in range(3)]
        for peer in peers:
            peer.until(SETTINGS)
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/test.Echo/Call")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"hello", timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            peers.pop().close()
            assert call(b"hello", timeout=30, wait_for_ready=True) == b"hello"
        for peer in peers:
            peer.close()
