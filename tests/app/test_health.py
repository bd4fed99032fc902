"""A client that watches health, in whatever way, blocks nobody else."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kept import kept
from layertap import Client
from layertap.app.health import NAME_CHARACTERS, WATCHES
from layertap.app.server import FeatureServer
from layertap.engine import Engine
from serving import started_server

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
Request = health_pb2.HealthCheckRequest

# Types and flags of HTTP/2 frames (RFC 9113), and a setting.
DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4


@pytest.fixture
def server() -> Iterator[FeatureServer]:
    """A server that is ready, without a model."""
    engine = Engine(plan_cache=kept())
    with started_server(engine) as server:
        yield server
    engine.close()


@pytest.fixture
def stub(server: FeatureServer) -> Iterator[health_pb2_grpc.HealthStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield health_pb2_grpc.HealthStub(channel)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    head = struct.pack(">I", len(payload))[1:] + bytes([kind, flags])
    return head + struct.pack(">I", stream) + payload


def header(name: bytes, value: bytes) -> bytes:
    """Return an HTTP/2 header that is neither indexed nor compressed."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def connected(address: str, window: int) -> socket.socket:
    """Return a connection on which each call may receive this many bytes."""
    host, port = address.rsplit(":", 1)
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, window))
        + frame(SETTINGS, ACK, 0, b"")
    )
    return connection


def begun(method: bytes, stream: int) -> bytes:
    """Return the frame that begins a health call."""
    headers = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": b"/grpc.health.v1.Health/" + method,
        b":authority": b"layertap",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
    }
    return frame(HEADERS, END_HEADERS, stream, b"".join(header(*each) for each in headers.items()))


def deaf_watcher(address: str) -> socket.socket:
    """Watch the server's health over a connection on which it may not send a byte."""
    connection = connected(address, window=0)
    empty_message = bytes(5)
    connection.sendall(begun(b"Watch", 1) + frame(DATA, END_STREAM, 1, empty_message))
    return connection


def taken(server: FeatureServer) -> int:
    return server._health._open.open


def wait_until_taken(server: FeatureServer, places: int) -> None:
    ends = time.monotonic() + 30
    while taken(server) != places:
        assert time.monotonic() < ends, f"{taken(server)} places are taken, not {places}"
        time.sleep(0.01)


def test_a_watcher_that_takes_nothing_holds_up_nobody(server, stub) -> None:
    """Checks are answered and the server stops although a message to a watcher can't be sent."""
    with closing(deaf_watcher(server.address)):
        wait_until_taken(server, 1)
        for _ in range(20):
            assert stub.Check(Request(), timeout=10).status == SERVING
            time.sleep(0.01)
        stopping = threading.Thread(target=server.stop, args=(0.5,), daemon=True)
        stopping.start()
        stopping.join(20)
        assert not stopping.is_alive()


def test_a_watcher_hears_of_the_end_and_does_not_delay_it(server, stub) -> None:
    """NOT_SERVING is the last status sent, and the server does not wait the grace period for it."""
    told = stub.Watch(Request(), timeout=60)
    assert next(told).status == SERVING
    begun = time.monotonic()
    server.stop(30)
    assert time.monotonic() - begun < 10
    assert [reply.status for reply in told] == [NOT_SERVING]


def test_watchers_are_bounded_and_make_room(server, stub) -> None:
    """One watcher too many is refused, requests keep their threads, and leaving makes room."""
    watching = [stub.Watch(Request(service=f"model {n}")) for n in range(WATCHES)]
    for each in watching:
        assert next(each).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    with pytest.raises(grpc.RpcError, match="64 calls watch health, the most allowed") as refused:
        next(stub.Watch(Request()))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with Client(server.address) as client:
        assert client.list_models() == []
    for each in watching:
        each.cancel()
    wait_until_taken(server, 0)
    told = stub.Watch(Request())
    assert next(told).status == SERVING
    told.cancel()


def test_long_names_are_refused(server, stub) -> None:
    """A watcher can't make the server store a name of any length."""
    with pytest.raises(grpc.RpcError) as refused:
        next(stub.Watch(Request(service="x" * (NAME_CHARACTERS + 1))))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert taken(server) == 0


@pytest.mark.parametrize("method", [b"Check", b"Watch"])
def test_calls_without_a_request_take_no_thread_of_others(server, method: bytes) -> None:
    """Health calls that are begun and never send a request don't keep others from being served."""
    with closing(connected(server.address, window=65_535)) as connection:
        calls = 2 * server._workers.count
        connection.sendall(b"".join(begun(method, 2 * n + 1) for n in range(calls)))
        time.sleep(0.5)  # Nobody tells of a call that waits for its request.
        with Client(server.address) as client:
            assert client.list_models(timeout=20) == []
