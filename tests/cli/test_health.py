"""``layertap health`` calls a real server, and its exit code is the answer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result

from kept import kept
from layertap.app.metrics import Metrics
from layertap.app.server import FeatureServer, ServerOptions
from layertap.cli.main import main
from layertap.engine import Engine
from serving import http_page


@pytest.fixture
def server() -> Iterator[FeatureServer]:
    engine = Engine(plan_cache=kept())
    server = FeatureServer(engine, ServerOptions(port=0))
    server.start()
    yield server
    server.stop(0)
    engine.close()


def health(*args: str) -> Result:
    return CliRunner().invoke(main, ["health", *args])


def test_not_serving_is_code_1(server: FeatureServer) -> None:
    """A server that is not ready yet is NOT_SERVING: code 1."""
    result = health("--server", server.address)
    assert (result.exit_code, result.output) == (1, "NOT_SERVING\n")


def test_serving_is_code_0(server: FeatureServer) -> None:
    """A ready server is SERVING: code 0; so is its service by name."""
    server.ready()
    for args in ((), ("--service", "layertap.v1.FeatureService")):
        result = health("--server", server.address, *args)
        assert (result.exit_code, result.output) == (0, "SERVING\n")


def test_unknown_service_is_code_1(server: FeatureServer) -> None:
    """An unknown service is reported: code 1."""
    server.ready()
    result = health("--server", server.address, "--service", "resnet99")
    assert result.exit_code == 1
    assert "'resnet99', unknown to this server" in result.output


def test_no_server_is_code_1(server: FeatureServer) -> None:
    """If no server listens, the command says so within its timeout: code 1."""
    server.stop(0)
    result = health("--server", server.address, "--timeout", "2")
    assert result.exit_code == 1
    assert server.address in result.output


def test_needs_no_torch() -> None:
    """The command does not import torch, so that a probe is cheap."""
    code = (
        "import sys; from layertap.cli.main import main\n"
        "try: main(['health', '--server', '127.0.0.1:1', '--timeout', '1'])\n"
        "except SystemExit as end: assert end.code == 1\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_page_is_asked_by_http(monkeypatch: pytest.MonkeyPatch) -> None:
    """--url prints the page; the code is 0 for status 200 only, even if a proxy is set."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    page = http_page(Metrics())
    ready = page.url.replace("/metrics", "/readyz")
    result = health("--url", ready)
    assert (result.exit_code, result.output) == (0, "ok\n")
    result = health("--url", ready + "z")
    assert (result.exit_code, result.output) == (1, "not found\n")
    page.close()
    result = health("--url", ready, "--timeout", "2")
    assert result.exit_code == 1
    assert "no answer" in result.output


@pytest.mark.parametrize("url", ["file:///etc/hostname", "127.0.0.1:8002", "http://", "https://a/"])
def test_a_url_that_is_none_is_code_2(url: str) -> None:
    """Any address other than http:// is refused before anything is opened."""
    result = health("--url", url)
    assert result.exit_code == 2
    assert "expected http://" in result.output
