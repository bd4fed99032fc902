"""The client for Node.js, installed and run as its README says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from layertap.app.server import FeatureServer
from reference import EXAMPLES, check, check_waits

FOLDER = EXAMPLES / "node"
OLDEST = 20

# The packages are fetched when they are not there yet.
pytestmark = pytest.mark.timeout(300)


def run(*command: str) -> str:
    """Run a command in the client's folder."""
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def client() -> list[str | Path]:
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("there is no Node.js with npm")
    version = run("node", "--version")
    if int(version[1:].partition(".")[0]) < OLDEST:
        pytest.skip(f"Node.js is {version.strip()}, the client needs {OLDEST}")
    run("npm", "install", "--no-audit", "--no-fund")
    return ["node", FOLDER / "client.js"]


@pytest.mark.parametrize("model", ["resnet18", "large"])
def test_it_prints_what_python_gets(client: list[str | Path], address: str, model: str) -> None:
    """Each value and the error equal the Python client's, in replies of 1 and of 16 MB."""
    check(client, address, model)


def test_it_waits_until_the_server_is_ready(
    client: list[str | Path], late_server: FeatureServer
) -> None:
    """It sends nothing before health is SERVING; a failure ends it with the error and a code."""
    check_waits(client, late_server)


@pytest.mark.usefixtures("client")
def test_its_own_checks_pass() -> None:
    """Its tests pass, and prettier changes nothing."""
    run("npm", "test")
    run("npm", "run", "check")
