"""Shared memory between real processes: killed processes leave nothing; metrics; settings."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from inprocess import configured
from kept import kept
from layertap import Client, errors
from layertap.app.metrics import Metrics
from layertap.app.security import Security, open_security
from layertap.app.server import FeatureServer, ServerOptions
from layertap.client.base import Method
from layertap.engine import Engine
from layertap.models import ModelSpec
from layertap.settings import SecretFiles, build
from layertap.shm.broker import open_broker
from layertap.shm.regions import supported
from layertap.v1.shared_memory_service_pb2 import OpenSharedMemoryResponse
from ports import free_port
from processes import serving
from serving import http_page
from tinynets import ITEM

pytestmark = pytest.mark.skipif(not supported(), reason="shared memory is Linux's")

MIB = 1 << 20
LARGE = np.random.default_rng(0).random((300, *ITEM), np.float32)
TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    yield engine
    engine.close()


@contextmanager
def running(
    engine: Engine, security: Security | None = None, **options: object
) -> Iterator[FeatureServer]:
    chosen = ServerOptions(port=0, **options)  # type: ignore[arg-type]
    server = FeatureServer(engine, chosen, security=security)
    server.start()
    server.ready()
    try:
        yield server
    finally:
        server.stop(0)


def eventually(condition: Callable[[], bool]) -> bool:
    """Wait until another thread or process has made something true."""
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


HOARD = textwrap.dedent("""
    import sys, numpy as np
    from layertap import Client
    client = Client(sys.argv[1])
    x = np.random.default_rng(0).random((300, 3, 16, 16), np.float32)
    kept = [client.extract("residual", x, "conv1") for _ in range(50)]
    print("kept", flush=True)
    sys.stdin.readline()
""")


def test_killed_client_leaves_its_regions_in_the_pool(engine: Engine) -> None:
    """After kill -9 of a client with 50 leases, all are free before the lease ends, and reused."""
    with running(engine, shared_memory_lease_seconds=60.0) as server:
        memory = server.shared_memory
        client = subprocess.Popen(
            [sys.executable, "-c", HOARD, server.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert client.stdin is not None
        assert client.stdout is not None
        assert client.stdout.readline() == "kept\n"
        assert memory.state().regions["leased"] == 50
        client.send_signal(signal.SIGKILL)
        assert client.wait(20) == -signal.SIGKILL
        begun = time.monotonic()
        assert eventually(lambda: memory.state().regions["free"] == 50)
        assert time.monotonic() - begun < 10
        client.stdin.close()
        client.stdout.close()
        with Client(server.address) as other:
            features = other.extract("residual", LARGE, "conv1")
            assert memory.state().regions["free"] == 49
            del features


def named_memory(process: int) -> set[str]:
    """Return the files in /dev/shm that a process has mapped.

    What the folder holds says nothing: other tests make and remove files in it meanwhile.
    """
    maps = Path(f"/proc/{process}/maps").read_text("utf-8")
    return set(re.findall(r" (/dev/shm/\S+)", maps))


def listens(name: str) -> bool:
    """Return whether there is an abstract socket with that name."""
    return f"@{name}" in Path("/proc/net/unix").read_text("utf-8")


def socket_of(address: str) -> str:
    """Request a server's abstract socket name."""
    with grpc.insecure_channel(address) as channel:
        reply = channel.unary_unary(Method.OPEN_SHARED_MEMORY)(b"", timeout=20)
    return OpenSharedMemoryResponse.FromString(reply).socket


def test_killed_server_leaves_nothing_and_its_clients_go_on() -> None:
    """After kill -9 of the server no file or socket remains, arrays stay, and sharing resumes."""
    before = named_memory(os.getpid())
    port = str(free_port())
    flags = ("tinynets:residual", "--item-shape", "3,16,16", "--port", port)
    with Client(f"127.0.0.1:{port}") as client:
        with serving(*flags) as server:
            assert server.address.endswith(port)
            features = client.extract("residual", LARGE, "conv1")
            session = client._opened()[0].memory._current
            assert session is not None
            assert session._live
            copy = features["conv1"].copy()
            name = socket_of(server.address)
            assert listens(name)
            named = (named_memory(server.process.pid) | named_memory(os.getpid())) - before
            os.kill(server.process.pid, signal.SIGKILL)
            server.ended()
        assert not [file for file in named if Path(file).exists()]
        assert eventually(lambda: not listens(name))
        assert eventually(lambda: session.lost)
        assert np.array_equal(features["conv1"], copy)
        assert np.array_equal(features.torch()["conv1"].numpy(), copy)
        with pytest.raises(errors.UnavailableError):
            client.extract("residual", LARGE, "conv1", timeout=5)
        with serving(*flags) as server:
            assert server.address.endswith(port)
            client.wait_ready(30)
            again = client.extract("residual", LARGE, "conv1")
            assert np.array_equal(again["conv1"], copy)
            assert np.array_equal(features["conv1"], copy)
            del again
            # It tried in vain when nobody listened, and does again after a second.
            time.sleep(1.0)
            again = client.extract("residual", LARGE, "conv1")
            assert client._opened()[0].memory._current is not session
            assert client._opened()[0].memory._current._live
            assert np.array_equal(again["conv1"], copy)
            assert np.array_equal(features["conv1"], copy)
            del again
            server.process.send_signal(signal.SIGTERM)
            assert server.ended() == 0


def test_restart_between_two_calls_costs_none_of_them() -> None:
    """After the server restarts on its port, the next call is answered through shared memory."""
    port = str(free_port())
    flags = ("tinynets:residual", "--item-shape", "3,16,16", "--port", port)
    with Client(f"127.0.0.1:{port}") as client:
        for _ in range(2):
            with serving(*flags) as server:
                assert server.address.endswith(port)
                client.wait_ready(30)
                assert client.extract("residual", LARGE, "conv1")["conv1"].shape[0] == 300
                gc.collect()
                session = client._opened()[0].memory._current
                assert session is not None
                assert not session.lost
                os.kill(server.process.pid, signal.SIGKILL)
                server.ended()
            assert eventually(lambda session=session: session.lost)


def test_page_shows_regions_and_fallbacks(engine: Engine) -> None:
    """The metrics show bytes and regions by state, sessions, shared bytes and fallbacks."""
    metrics = Metrics(engine)
    server = FeatureServer(
        engine, ServerOptions(port=0, shared_memory_bytes=5 * MIB), observer=metrics
    )
    metrics.show_shared_memory(server.shared_memory)
    server.start()
    server.ready()
    page = http_page(metrics)

    def value(name: str) -> float:
        with urllib.request.urlopen(page.url) as reply:  # noqa: S310 - our own page
            for line in reply.read().decode().splitlines():
                if line.startswith(f"{name} "):
                    return float(line.split()[-1])
        return -1.0

    with Client(server.address) as client:
        kept = [client.extract("residual", LARGE, "conv1") for _ in range(4)]
        nbytes = kept[0]["conv1"].nbytes
        assert value('layertap_shared_memory_regions{state="leased"}') == 2
        assert value('layertap_shared_memory_bytes{state="leased"}') >= 2 * nbytes
        assert value("layertap_shared_memory_limit_bytes") == 5 * MIB
        assert value("layertap_shared_memory_sessions") == 1
        assert value("layertap_shared_memory_reply_bytes_total") == 2 * nbytes
        assert value('layertap_shared_memory_fallback_total{reason="share"}') == 2
        total = value('layertap_inference_reply_bytes_total{model="residual"}')
        assert 4 * nbytes < total < 4 * nbytes + 2000
        del kept
    page.close()
    server.stop(0)


def test_settings_reach_the_server() -> None:
    """The server uses the file's MiB and seconds; 0 MiB disables shared memory."""
    section = {"shared_memory_mib": 3, "shared_memory_lease_seconds": 0.5}
    options = build(ServerOptions, section)
    assert options.shared_memory_bytes == 3 * MIB
    assert options.shared_memory_lease_seconds == 0.5
    none = build(ServerOptions, {"shared_memory_mib": 0}).shared_memory_bytes
    assert open_broker(none, 1, regions=4, clients=4) is None


def test_flags_turn_it_off(engine: Engine) -> None:
    """With `--shared-memory-mib 0` the server works without the service and without a socket."""
    config, _, _ = configured("residual", "--shared-memory-mib", "0")
    none = config.server.shared_memory_bytes
    with (
        running(engine, shared_memory_bytes=none) as server,
        Client(server.address) as client,
    ):
        assert client.extract("residual", LARGE, "conv1")["conv1"].shape[0] == 300
        assert client._opened()[0].memory._current is None
        with pytest.raises(grpc.RpcError) as caught:
            socket_of(server.address)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_where_sockets_are_forbidden_replies_are_sent(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the system forbids sockets or files, this is logged once, and the server serves."""

    def refuse(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("layertap.shm.broker.Broker", refuse)
    with running(engine) as server, Client(server.address) as client:
        assert server.shared_memory is None
        assert client.extract("residual", LARGE, "conv1")["conv1"].shape[0] == 300
    assert "shared memory is not available" in caplog.text


def test_tokens_guard_the_ticket(engine: Engine, tmp_path: Path) -> None:
    """Without a token nobody learns where to connect; with one the client shares memory."""
    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n", "utf-8")
    file.chmod(0o600)
    security = open_security(SecretFiles(extract_tokens_file=file))
    with running(engine, security) as server:
        with grpc.insecure_channel(server.address) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(Method.OPEN_SHARED_MEMORY)(b"", timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with Client(server.address, token=TOKEN) as client:
            features = client.extract("residual", LARGE, "conv1")
            assert server.shared_memory.state().regions["leased"] == 1
            del features
