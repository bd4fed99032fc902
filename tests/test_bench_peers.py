"""The benchmark of other servers verifies and times those that need no environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
MARK = "LAYERTAP_TEST_PEERS"
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]  # Servers are started.

SHOWN = ["layertap", "layertap, TCP", "bare gRPC"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A short run: its folder of results, what it printed, and the mark of its processes."""
    folder, mark = tmp_path_factory.mktemp("peers"), uuid.uuid4().hex
    command = [sys.executable, "-W", "ignore", "benchmarks/bench_peers.py", "--rounds", "1"]
    command += ["--seconds", "0.05", "--batches", "1", "--callers", "1", "3"]
    command += ["--batching", "off"]  # Its measurement takes long on a busy machine.
    command += ["--results", str(folder), "--peers", *SHOWN]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, MARK: mark},
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, mark


@pytest.fixture(scope="module")
def results(run: tuple[Path, str, str]) -> dict[str, Any]:
    """The results of the run."""
    return json.loads((run[0] / "peers.json").read_text("utf-8"))


def test_every_value_was_verified(results) -> None:
    """No server is left out, and none differs from the plain module by more than 1e-4."""
    assert results["left out"] == {}
    assert list(results["largest difference"]) == SHOWN
    assert all(0 <= each <= 1e-4 for each in results["largest difference"].values())


def test_every_row_has_all_servers(results) -> None:
    """Each layer is asked for with a tensor and a photograph, by one caller and by three."""
    rows = {(row["layer"], row["sent"], row["callers"]) for row in results["rows"]}
    assert rows == {
        (layer, sent, callers)
        for layer in ("layer1", "avgpool")
        for sent in ("tensor", "image")
        for callers in (1, 3)
    }
    for row in results["rows"]:
        assert row["reply bytes"] == {"layer1": 64 * 56 * 56 * 4, "avgpool": 512 * 4}[row["layer"]]
        for figures in (row["ms"], row["rates"]):
            assert list(figures) == SHOWN
            assert all(0 < each["p25"] <= each["p50"] <= each["p75"] for each in figures.values())


def test_the_page_is_written(run) -> None:
    """It has both tables and charts."""
    page = (run[0] / "README.md").read_text("utf-8")
    assert "How does layertap compare with other servers?" in page
    assert page.count("| a tensor, avgpool (2 KB) |") == 2
    assert {"peers.png", "peers_3.png"} <= {file.name for file in run[0].iterdir()}


def test_nothing_stays_running(run) -> None:
    """All processes of the run have ended."""
    wanted = f"{MARK}={run[2]}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        assert wanted not in environment.split(b"\0"), folder


def test_a_missing_environment_is_named(tmp_path: Path) -> None:
    """A server without its environment is left out with the reason, and the others are measured."""
    code = """
import json, sys
import bench_peers
from pathlib import Path
bench_peers.ENVIRONMENTS = Path(sys.argv[1])
servers = bench_peers.Servers(1, Path(sys.argv[1]))
peer = next(each for each in bench_peers.PEERS if each.environment)
try:
    servers.address(peer)
except bench_peers.NotServingError as error:
    print(error)
servers.close()
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")},
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "its environment is missing: run `make bench-peers`"
