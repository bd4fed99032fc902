"""A real ``layertap serve`` starts, serves, drains and ends as signals request."""

from __future__ import annotations

import logging
import re
import signal
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from layertap import Client
from layertap.app import lifecycle
from layertap.app.config import ServerConfig
from layertap.errors import LayertapError, UnavailableError
from layertap.settings import METRICS_OFF, ModelSpec, ServedModel, ServerOptions
from processes import Serving, layertap, serving

SLEEPY = ("slownets:sleepy", "--item-shape", "3,4,4")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def batch(milliseconds: float = 0.0) -> np.ndarray:
    """Return an input that makes the model Sleepy sleep this long."""
    return np.full((1, 3, 4, 4), milliseconds, np.float32)


def health(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status


def wait_until_running(server: Serving, at_least: int = 1) -> None:
    """Wait until this many requests wait for the compute thread or run on it."""
    url = server.line(r"metrics on (\S+)$")[1]
    for _ in range(100):
        with urllib.request.urlopen(url) as reply:  # noqa: S310 - our own page
            pending = re.search(rb"pending_request_count ([0-9.]+)\n", reply.read())
            if pending and float(pending[1]) >= at_least:
                return
        time.sleep(0.05)
    pytest.fail("the requests never reached the compute thread")


def test_serves_then_drains_on_sigterm() -> None:
    """SIGTERM lets an admitted call finish, reports NOT_SERVING to others, and ends with code 0."""
    with (
        serving(*SLEEPY, "--layers", "conv", "--metrics-port", "0", fresh=True) as server,
        ThreadPoolExecutor(1) as pool,
        Client(server.address) as client,
    ):
        client.wait_ready()
        assert health(server.address) == SERVING
        assert list(client.list_models()[0].declared_layers) == ["conv"]
        # Its code looks at values, so that it is not compiled.
        assert client.extract("sleepy", batch(), "conv").extractor == "hook"
        slow = pool.submit(client.extract, "sleepy", batch(2000), "conv", extractor="hook")
        wait_until_running(server)
        server.process.send_signal(signal.SIGTERM)
        server.line("stopping")
        assert slow.result()["conv"].shape == (1, 2, 4, 4)
        assert server.ended() == 0
        assert server.lines[-1] == "layertap: stopped serving"
        assert not any("Traceback" in line for line in server.lines)


@pytest.mark.long
def test_an_endless_grace_is_one() -> None:
    """``--grace inf`` waits for the admitted calls, and then ends as with any other value."""
    with (
        serving(*SLEEPY, "--grace", "inf", "--metrics-port", "0") as server,
        ThreadPoolExecutor(1) as pool,
        Client(server.address) as client,
    ):
        slow = pool.submit(client.extract, "sleepy", batch(1000), "conv", extractor="hook")
        wait_until_running(server)
        server.process.send_signal(signal.SIGTERM)
        assert slow.result()["conv"].shape == (1, 2, 4, 4)
        assert server.ended() == 0
        assert not any("Traceback" in line for line in server.lines)


def test_second_signal_ends_at_once() -> None:
    """A second signal ends the process without waiting for the running call."""
    with (
        serving(*SLEEPY, "--grace", "100", "--metrics-port", "0", "--host", "0.0.0.0") as server,  # noqa: S104 - the warning is what is tested
        ThreadPoolExecutor(1) as pool,
        Client(server.address.replace("0.0.0.0", "127.0.0.1")) as client,  # noqa: S104
    ):
        assert server.line("warning: 0.0.0.0 can be reached from other machines")
        slow = pool.submit(client.extract, "sleepy", batch(50_000), "conv", extractor="hook")
        wait_until_running(server)
        server.process.send_signal(signal.SIGINT)
        server.line("stopping")
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 128 + signal.SIGTERM
        assert time.monotonic() - begun < 10
        assert slow.exception() is not None


def test_answers_not_serving_while_it_loads() -> None:
    """Health answers NOT_SERVING while a model loads, and SIGTERM then ends it with code 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serving("slownets:never", "--port", str(port), "--metrics-port", "0") as server:
        server.line("metrics on")  # Printed after the server has started.
        assert health(f"127.0.0.1:{port}") == NOT_SERVING
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 0
        assert server.lines[-1] == "layertap: stopped before it was ready"


class Listener:
    """Records what the server reports."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str, level: int = logging.INFO) -> None:
        self.said.append(text)

    def busy(self, text: str) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.mark.parametrize(
    ("section", "asked", "note"),
    [
        ({}, [1024], True),
        ({"keep_memory_bytes": 64 << 20}, [64], True),
        ({"keep_memory": False}, [], False),
    ],
)
def test_memory_is_kept_unless_turned_off(
    monkeypatch, section: dict, asked: list[int], note: bool
) -> None:
    """The server keeps memory as configured, and says so if the C library can't.

    Not before its models are loaded: until then large models are measured with less.
    """
    bounds: list[int] = []
    order: list[str] = []
    load = lifecycle.ServedModels.load

    def loads(self: object, *args: object, **options: object) -> None:
        order.append("load")
        load(self, *args, **options)

    def keeps(mib: int) -> None:
        order.append("keep")
        bounds.append(mib)

    def ends(state: str) -> None:
        raise LayertapError("that is all")

    monkeypatch.setattr(lifecycle.ServedModels, "load", loads)
    monkeypatch.setattr(lifecycle, "begin_loading", lambda: order.append("begin"))
    monkeypatch.setattr(lifecycle, "keep_memory", keeps)
    monkeypatch.setattr(lifecycle, "notify", ends)
    config = ServerConfig(
        server=ServerOptions(port=0, metrics_port=METRICS_OFF, **section),
        models=(ServedModel(ModelSpec("tinynets:block", item_shape=(3, 8, 8))),),
    )
    listener = Listener()
    assert lifecycle.run_server(config, listener) == 1
    assert listener.said[-1] == "that is all"
    assert bounds == asked
    assert order == (["begin", "load", "keep"] if asked else ["load"])
    assert any("freed memory can't be kept" in text for text in listener.said) is note


def test_model_that_cannot_load_ends_it(tmp_path: Path) -> None:
    """If no model can be loaded, the server ends with code 1 and the reason, no traceback."""
    config = tmp_path / "layertap.toml"
    config.write_text(
        "[server]\nport = 0\nmetrics_port = -1\n[[models]]\nsource = 'slownets:gone'\n"
    )
    result = layertap("serve", "--config", str(config), fresh=False)
    assert result.returncode == 1
    assert "layertap: error: factory slownets:gone" in result.stderr
    assert result.stderr.count("slownets:gone") == 1
    assert "Traceback" not in result.stderr


def test_a_restart_uses_the_plans_that_were_kept(tmp_path: Path) -> None:
    """A server that is killed and started again uses the stored plans for its declared layers."""
    args = ("tinynets:residual", "--item-shape", "3,16,16", "--layers", "layer1,fc")
    kept: list[dict[str, int]] = []
    for _ in range(2):
        with (
            serving(*args, "--plan-cache", str(tmp_path / "plans")) as server,
            Client(server.address) as client,
        ):
            client.wait_ready()
            features = client.extract("residual", np.zeros((1, 3, 16, 16), np.float32), "layer1")
            assert features.extractor == "torchscript"
            server.process.kill()
            files = (tmp_path / "plans").iterdir()
            kept.append({file.name: file.stat().st_ino for file in files})
    # The program for both layers, the proofs of that one and of its parts, and the catalogue.
    assert sorted(Path(name).suffix for name in kept[0]) == [".catalogue", *[".proof"] * 3, ".pt"]
    assert kept[0] == kept[1]


@pytest.mark.long
def test_drains_under_load() -> None:
    """At SIGTERM all admitted calls are answered, and later ones get UNAVAILABLE."""
    ended = threading.Event()

    def hammer(address: str) -> int:
        answers = 0
        with Client(address) as client:
            while not ended.is_set():
                try:
                    client.extract("sleepy", batch(), "conv", extractor="hook")
                except UnavailableError:
                    return answers
                answers += 1
        pytest.fail("it was answered after the server had ended")

    with (
        serving(*SLEEPY, "--metrics-port", "0", "--grace", "60") as server,
        ThreadPoolExecutor(10) as pool,
        Client(server.address) as client,
    ):
        quick = [pool.submit(hammer, server.address) for _ in range(4)]
        slow = [
            pool.submit(client.extract, "sleepy", batch(1000), "conv", extractor="hook")
            for _ in range(4)
        ]
        wait_until_running(server, at_least=4)
        server.process.send_signal(signal.SIGTERM)
        assert [one.result()["conv"].shape for one in slow] == [(1, 2, 4, 4)] * 4
        assert server.ended() == 0
        assert min(one.result() for one in quick) >= 0
        ended.set()
