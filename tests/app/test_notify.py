"""systemd is notified when the server is ready and when it stops, over a real socket."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from layertap.app.notify import notify
from processes import serving


@pytest.fixture
def manager(tmp_path: Path) -> socket.socket:
    """Listen as a service manager does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.settimeout(60)
        listening.bind(str(tmp_path / "notify"))
        yield listening


def test_state_is_one_datagram(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is sent unchanged, in one datagram."""
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    notify("READY=1")
    assert manager.recv(100) == b"READY=1"


def test_abstract_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An address that begins with @ is in the abstract namespace."""
    name = f"layertap-test-{tmp_path.name}-{id(tmp_path)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.settimeout(60)
        listening.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notify("STOPPING=1")
        assert listening.recv(100) == b"STOPPING=1"


def test_nobody_listens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a manager nothing happens; a manager that is gone is logged, and no error."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    assert caplog.text == ""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify("READY=1")
    assert "can't notify the service manager of READY=1" in caplog.text


def test_serve_tells_ready_and_stopping(manager: socket.socket) -> None:
    """``layertap serve`` sends READY=1 once its models are loaded, and STOPPING=1 at SIGTERM."""
    told = {"NOTIFY_SOCKET": manager.getsockname()}
    with serving("tinynets:residual", "--item-shape", "3,8,8", environment=told) as server:
        assert manager.recv(100) == b"READY=1"
        assert any("loaded residual" in line for line in server.lines)
        server.process.terminate()
        assert manager.recv(100) == b"STOPPING=1"
        assert server.ended() == 0
