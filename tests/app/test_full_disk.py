"""A real ``layertap serve`` keeps serving when the disks that it writes to are full."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import numpy as np
import pytest

from disks import small_disk
from layertap import Client
from processes import ENVIRONMENT, serving
from warm import Forked

X = np.random.default_rng(0).random((2, 3, 16, 16), np.float32)
CONFIG = (
    '[[models]]\nname = "m"\nsource = "tinynets:residual"\nitem_shape = [3, 16, 16]\nlayers = {}\n'
)


@pytest.mark.long
def test_a_plan_cache_that_is_full_or_fills_up_is_survived(tmp_path: Path) -> None:
    """Full at the start and at a reload: each plan is served, and the log says it is not stored."""
    config = tmp_path / "layertap.toml"
    with small_disk(tmp_path / "disk", "64k") as disk:
        disk.fill()
        config.write_text(CONFIG.format('["layer1"]'))
        args = ("--config", str(config), "--admin", "--plan-cache", str(disk.folder))
        with serving(*args) as server, Client(server.address) as client:
            client.wait_ready(60)
            server.line("plan not stored: No space left on device")
            reference = client.extract("m", X, "layer2", extractor="hook")["layer2"].copy()
            config.write_text(CONFIG.format('["layer1", "layer2"]'))
            assert client.reload(timeout=60).models[0].serving
            # The program for both; those for each of them are parts of it.
            server.line("plan not stored: No space left on device", count=2)
            got = client.extract("m", X, "layer2", extractor="torchscript")["layer2"]
            assert np.allclose(got, reference, atol=1e-4)
            assert disk.names() == []
            server.process.send_signal(signal.SIGTERM)
            assert server.ended() == 0


@pytest.mark.parametrize("form", ["human", "json"])
def test_messages_that_can_not_be_written_are_survived(form: str) -> None:
    """If its log is on a full disk, the server still becomes ready, answers and exits with 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = ("serve", "m=tinynets:residual", "--item-shape", "3,16,16", "--port", str(port))
    rest = ("--metrics-port", "-1", "--plan-cache", "off", "--log-level", "info")
    with Path("/dev/full").open("w") as full, Client(f"127.0.0.1:{port}") as client:
        all_args = (*args, *rest, "--log-format", form)
        server = Forked(all_args, ENVIRONMENT, Path.cwd(), error=full.fileno())
        try:
            client.wait_ready(60)
            assert client.extract("m", X, "layer1")["layer1"].shape[0] == 2
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
        finally:
            server.kill()
