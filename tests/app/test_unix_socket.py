"""Listening on Unix sockets, and the maximum age of connections."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from authorities import Authority
from kept import kept
from layertap import Client, Tls
from layertap.addresses import is_loopback, is_unix, unix_path
from layertap.app.config_file import load_config
from layertap.app.grpc_options import channel_options
from layertap.app.server import FeatureServer, ServerOptions
from layertap.engine import Engine
from layertap.errors import ConfigError, UnavailableError
from layertap.models import ModelSpec
from layertap.settings import SecretFiles
from processes import ENVIRONMENT, Serving
from tinynets import ITEM

X = np.random.default_rng(5).random((64, *ITEM), np.float32)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with a small net."""
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    yield engine
    engine.close()


def serve(engine: Engine, **options: object) -> FeatureServer:
    server = FeatureServer(engine, ServerOptions(**{"port": 0, **options}))
    server.start()
    server.ready()
    return server


def ask(target: str, **options: object) -> np.ndarray:
    with Client(target, timeout=30, **options) as client:
        return client.extract("residual", X, "layer1", extractor="hook")["layer1"].copy()


@pytest.mark.parametrize(
    ("address", "unix", "path"),
    [
        ("unix:/run/a", True, "/run/a"),
        ("unix:///run/a", True, "/run/a"),
        ("unix:a", True, "a"),
        ("unix-abstract:a", True, ""),
        ("127.0.0.1", False, ""),
        ("unix", False, ""),
        ("::1", False, ""),
        ("example.org", False, ""),
    ],
)
def test_addresses_of_unix_sockets(address: str, unix: bool, path: str) -> None:
    """They are recognised by their scheme, and no other machine can reach them."""
    assert (is_unix(address), unix_path(address)) == (unix, path)
    assert is_loopback(address) or not unix


@pytest.mark.parametrize("form", ["unix:{}", "unix://{}"])
def test_only_a_unix_socket(engine: Engine, tmp_path: Path, form: str) -> None:
    """It replaces the port; only this user may connect; the file is removed at the end."""
    path = tmp_path / "s"
    server = serve(engine, host=form.format(path))
    try:
        assert server.addresses == (f"unix:{path}",)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        want = ask(server.address, shared_memory=False)
        np.testing.assert_array_equal(ask(server.address, shared_memory=True), want)
        np.testing.assert_array_equal(ask(f"unix://{path}", shared_memory=False), want)
    finally:
        server.stop(0)
    assert list(tmp_path.iterdir()) == []


def test_a_unix_socket_besides_the_port(engine: Engine, tmp_path: Path) -> None:
    """Both give the same answers; the file has the requested mode."""
    path = tmp_path / "s"
    server = serve(engine, unix_socket=path, unix_socket_mode=0o660)
    try:
        host, local = server.addresses
        assert host == server.address
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        np.testing.assert_array_equal(ask(host), ask(local))
    finally:
        server.stop(0)
    assert not path.exists()


def test_an_abstract_socket(engine: Engine) -> None:
    """It has a name and no file."""
    address = f"unix-abstract:layertap-test-{os.getpid()}"
    server = serve(engine, host=address)
    try:
        assert server.addresses == (address,)
        assert ask(address).shape[0] == len(X)
    finally:
        server.stop(0)


def test_tls_holds_on_a_unix_socket(engine: Engine, tmp_path: Path) -> None:
    """A server with TLS uses TLS there too."""
    authority = Authority(tmp_path / "ca")
    issued = authority.issue("localhost")
    options = ServerOptions(
        port=0,
        unix_socket=tmp_path / "s",
        secrets=SecretFiles(tls_cert=issued.certificate, tls_key=issued.key),
    )
    server = FeatureServer(engine, options)
    server.start()
    server.ready()
    try:
        target = server.addresses[1]
        tls = Tls(ca=authority.file, server_name="localhost")
        assert ask(target, tls=tls).shape[0] == len(X)
        with pytest.raises(UnavailableError), Client(target, timeout=5) as client:
            client.list_models()
    finally:
        server.stop(0)


def test_a_stale_socket_is_replaced(engine: Engine, tmp_path: Path) -> None:
    """A file that a killed server left behind is replaced."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    server = serve(engine, host=f"unix:{path}")
    try:
        assert ask(server.address).shape[0] == len(X)
    finally:
        server.stop(0)


def test_a_socket_in_use_is_left_alone(engine: Engine, tmp_path: Path) -> None:
    """A second server is refused, and the first keeps serving."""
    path = tmp_path / "s"
    server = serve(engine, host=f"unix:{path}")
    try:
        with pytest.raises(UnavailableError, match="another server listens there"):
            FeatureServer(engine, ServerOptions(host=f"unix:{path}"))
        assert ask(server.address).shape[0] == len(X)
    finally:
        server.stop(0)


def test_another_servers_socket_is_not_removed(engine: Engine, tmp_path: Path) -> None:
    """If another file is at the path at the end, it is not removed."""
    path = tmp_path / "s"
    first = serve(engine, host=f"unix:{path}")
    path.unlink()
    second = serve(engine, host=f"unix:{path}")
    try:
        first.stop(0)
        assert ask(second.address).shape[0] == len(X)
    finally:
        second.stop(0)
    assert not path.exists()


def test_what_will_not_do_is_refused(engine: Engine, tmp_path: Path) -> None:
    """The error names the address and the reason; nothing is left behind or changed."""
    file = tmp_path / "file"
    file.write_text("precious")
    long = tmp_path / ("x" * 120)
    for path, reason in (
        (file, "not a socket"),
        (long, "too long"),
        (tmp_path / "gone" / "s", "No such file"),
    ):
        with pytest.raises(UnavailableError, match=f"can't listen on unix:{path}: .*{reason}"):
            FeatureServer(engine, ServerOptions(host=f"unix:{path}"))
    assert file.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [file]


def test_the_file_says_where(tmp_path: Path) -> None:
    """A relative path is relative to the file; an invalid mode is an error."""
    config = tmp_path / "layertap.toml"
    config.write_text('[server]\nunix_socket = "run/s"\nunix_socket_mode = "0660"\n')
    options = load_config(config).server
    assert options.unix_socket == tmp_path / "run" / "s"
    assert options.unix_socket_mode == 0o660
    config.write_text('[server]\nunix_socket_mode = "rw"\n')
    with pytest.raises(ConfigError, match="unix_socket_mode: got 'rw', expected permissions"):
        load_config(config)


def test_serve_on_a_unix_socket(tmp_path: Path) -> None:
    """The server of the command line answers there, also for health, and ends cleanly."""
    path = tmp_path / "s"
    args = ("tinynets:residual", "--item-shape", "3,32,32", "--metrics-port", "0")
    server = Serving([*args, "--host", f"unix:{path}", "--plan-cache", "off"], fresh=False)
    try:
        assert server.address == f"unix:{path}"
        assert server.line(r"metrics on http://127\.0\.0\.1:")
        asked = subprocess.run(
            [sys.executable, "-m", "layertap", "health", "--server", server.address],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (asked.returncode, asked.stdout) == (0, "SERVING\n")
        server.process.terminate()
        assert server.ended() == 0
    finally:
        server.close()
    assert not path.exists()


def test_no_age_is_set_by_default() -> None:
    """Connections have no maximum age; a number sets one, in milliseconds."""
    assert not any("connection_age" in name for name, _ in channel_options(1))
    options = dict(channel_options(1, 1, 60.0, 2.5))
    assert options["grpc.max_connection_age_ms"] == 60_000
    assert options["grpc.max_connection_age_grace_ms"] == 2_500
    assert dict(channel_options(1, 1, 1e12))["grpc.max_connection_age_ms"] == 2**31 - 1


def test_connections_end_of_age_without_a_failed_call(engine: Engine) -> None:
    """A client continues over one connection after the other, and no call fails."""
    peers: set[str] = set()

    class Peers(grpc.ServerInterceptor):  # type: ignore[misc] # gRPC has no types
        def intercept_service(self, continuation, details):
            handler = continuation(details)

            def seen(message, context):
                peers.add(context.peer())
                return handler.unary_unary(message, context)

            return grpc.unary_unary_rpc_method_handler(seen) if handler.unary_unary else handler

    options = ServerOptions(port=0, max_connection_age_seconds=0.3)
    server = FeatureServer(engine, options, interceptors=(Peers(),))
    server.start()
    server.ready()
    try:
        with Client(server.address, shared_memory=False) as client:
            ends = time.monotonic() + 30
            while len(peers) < 4:
                assert time.monotonic() < ends
                assert len(client.list_models()) == 1
    finally:
        server.stop(0)
