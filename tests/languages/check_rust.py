"""The client in Rust, built by cargo and run against a real server."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from layertap.app.server import FeatureServer
from reference import EXAMPLES, check, check_waits

FOLDER = EXAMPLES / "rust"
TARGET = FOLDER / "target"

# A first build compiles gRPC and a protobuf compiler.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def client() -> Path:
    """The built program."""
    if (cargo := shutil.which("cargo")) is None:
        pytest.skip("cargo is not installed: https://rustup.rs")
    # The folder is named because a CARGO_TARGET_DIR of the user's would put it elsewhere.
    subprocess.run(
        [cargo, "build", "--quiet", "--target-dir", TARGET], cwd=FOLDER, check=True, timeout=1100
    )
    return TARGET / "debug" / "client"


def test_prints_what_the_python_client_gets(client: Path, address: str) -> None:
    """Shapes, types, values and the error equal those of the Python client."""
    check([client], address, "resnet18")


def test_receives_large_replies(client: Path, address: str) -> None:
    """Replies over gRPC's default limit of 4 MB arrive."""
    check([client], address, "large")


@pytest.mark.usefixtures("client")
def test_its_own_checks_pass() -> None:
    """Its tests pass."""
    done = subprocess.run(
        [shutil.which("cargo") or "cargo", "test", "--quiet", "--target-dir", TARGET],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_waits_until_ready(client: Path, late_server: FeatureServer) -> None:
    """It sends no request before the server is SERVING."""
    check_waits([client], late_server)
