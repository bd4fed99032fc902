"""The client in Go, generated, built and run as its README says."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from layertap.app.server import FeatureServer
from reference import EXAMPLES, ROOT, check, check_waits

FOLDER = EXAMPLES / "go"
# Where a machine has no protoc, that of the environment that generates Python's code.
GENERATOR = ROOT / ".venv-gen" / "bin" / "python"

# The modules are fetched and compiled when they are not there yet.
pytestmark = pytest.mark.timeout(900)


def run(*command: str | Path, path: Path) -> str:
    """Run a command in the client's folder, with one more folder in PATH."""
    done = subprocess.run(
        command,
        cwd=FOLDER,
        env={**os.environ, "PATH": f"{os.environ['PATH']}{os.pathsep}{path}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the end of PATH, with a protoc."""
    if shutil.which("go") is None:
        pytest.skip("there is no go")
    folder = tmp_path_factory.mktemp("tools")
    if shutil.which("protoc") is None:
        if not GENERATOR.exists():
            pytest.skip("there is neither protoc nor .venv-gen: make setup")
        protoc = folder / "protoc"
        protoc.write_text(f'#!/bin/sh\nexec "{GENERATOR}" -m grpc_tools.protoc "$@"\n', "utf-8")
        protoc.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def client(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("go") / "client"
    run("go", "generate", path=tools)
    run("go", "build", "-o", program, path=tools)
    return program


@pytest.mark.parametrize("model", ["resnet18", "large"])
def test_it_prints_what_python_gets(client: Path, address: str, model: str) -> None:
    """Each value and the error equal the Python client's, in replies of 1 and of 16 MB."""
    check([client], address, model)


def test_it_waits_until_the_server_is_ready(client: Path, late_server: FeatureServer) -> None:
    """It sends nothing before health is SERVING; a failure ends it with the error and a code."""
    check_waits([client], late_server)


@pytest.mark.usefixtures("client")
def test_its_own_checks_pass(tools: Path) -> None:
    """Its tests pass, and `go vet` and gofmt report nothing."""
    run("go", "test", ".", path=tools)
    run("go", "vet", ".", path=tools)
    assert run("gofmt", "-l", *FOLDER.glob("*.go"), path=tools) == ""
