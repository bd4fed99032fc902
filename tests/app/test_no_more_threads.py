"""A server that can get no more threads refuses some calls, and later serves again."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from layertap import Client, LayertapError
from processes import Serving
from tinynets import ITEM

PIDS = Path(os.environ.get("CGROUP_PIDS", "/sys/fs/cgroup/pids"))
ARGS = ("--port", "0", "--metrics-port", "-1", "--plan-cache", "off", "--item-shape", "3,32,32")


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group that limits the number of processes, for a test."""
    group = PIDS / f"layertap-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip(f"no control group of processes can be made in {PIDS}")
    if not (group / "pids.max").exists():
        group.rmdir()
        pytest.skip(f"{PIDS} does not limit processes")
    yield group
    ends = time.monotonic() + 20
    while group.exists() and time.monotonic() < ends:
        try:
            group.rmdir()
        except OSError:  # The server is still ending.
            time.sleep(0.1)


def threads_of(server: Serving) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))


@pytest.mark.long
def test_a_burst_at_the_limit_is_survived(group: Path) -> None:
    """Without new threads every call ends, health answers, and later calls are served."""
    server = Serving(["tinynets:residual", *ARGS], fresh=False)
    x = np.random.default_rng(0).random((1, *ITEM), np.float32)
    outcomes: list[str] = []

    def call() -> None:
        try:
            with Client(server.address, timeout=30, shared_memory=False) as client:
                client.extract("residual", x, "layer1", extractor="hook")
                for got in client.extract_many("residual", [x] * 3, "layer1", return_errors=True):
                    assert got is not None
            outcomes.append("ok")
        except LayertapError as error:
            outcomes.append(type(error).__name__)

    try:
        address = server.address
        with Client(address, timeout=30, shared_memory=False) as client:
            want = client.extract("residual", x, "layer1", extractor="hook")["layer1"].copy()
            (group / "pids.max").write_text(str(threads_of(server)))
            (group / "cgroup.procs").write_text(str(server.process.pid))
            callers = [threading.Thread(target=call) for _ in range(64)]
            for each in callers:
                each.start()
            for _ in range(5):
                assert client.health(timeout=20) == "SERVING"
            for each in callers:
                each.join(60)
            assert len(outcomes) == 64
            assert set(outcomes) <= {"ok", "OverloadedError"}
            assert "ok" in outcomes
            got = client.extract("residual", x, "layer1", extractor="hook")["layer1"]
            np.testing.assert_array_equal(got, want)
        server.process.terminate()
        assert server.ended() == 0
    finally:
        server.close()


@pytest.mark.long
def test_a_tight_limit_leaves_a_smaller_server(group: Path) -> None:
    """A server that starts under a limit says that it serves fewer calls at once, and serves."""
    (group / "pids.max").write_text("100")
    # A shell joins the group and becomes the server: this process has more threads than that, and
    # gRPC ends a process that can't have another.
    join = ("sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh")
    server = Serving(["tinynets:residual", *ARGS], prefix=join)
    try:
        with Client(server.address, timeout=30) as client:
            x = np.zeros((1, *ITEM), np.float32)
            assert client.extract("residual", x, "layer1")["layer1"].shape[0] == 1
        assert any("threads fewer than the" in line for line in server.lines)
        assert threads_of(server) < 100
        server.process.terminate()
        assert server.ended() == 0
    finally:
        server.close()
