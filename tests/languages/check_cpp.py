"""The client in C++, built by CMake and run as its README says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from layertap.app.server import FeatureServer
from reference import EXAMPLES, check, check_waits

FOLDER = EXAMPLES / "cpp"
BUILD = FOLDER / "build"

# What CMake says where something that the README asks for is not installed.
MISSING = {
    "No CMAKE_CXX_COMPILER could be found": "there is no C++ compiler",
    "Could NOT find Protobuf": "there is no protobuf for C++: libprotobuf-dev",
    "there is no protoc": "there is no protoc: protobuf-compiler",
    'provided by "gRPC"': "there is no gRPC for C++: libgrpc++-dev",
    "gRPC::grpc_cpp_plugin": "there is no gRPC plugin for protoc: protobuf-compiler-grpc",
}

# It compiles the generated code.
pytestmark = pytest.mark.timeout(900)


def run(*command: str | Path) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def client() -> Path:
    """The built program."""
    if (cmake := shutil.which("cmake")) is None:
        pytest.skip("there is no cmake")
    configured = subprocess.run(
        [cmake, "-S", FOLDER, "-B", BUILD], capture_output=True, text=True, check=False
    )
    if configured.returncode != 0:
        for sign, reason in MISSING.items():
            if sign in configured.stderr:
                pytest.skip(reason)
    assert configured.returncode == 0, configured.stdout + configured.stderr
    run(cmake, "--build", BUILD)
    return BUILD / "client"


@pytest.mark.parametrize("model", ["resnet18", "large"])
def test_it_prints_what_python_gets(client: Path, address: str, model: str) -> None:
    """Each value and the error equal the Python client's, in replies of 1 and of 16 MB."""
    check([client], address, model)


def test_it_waits_until_the_server_is_ready(client: Path, late_server: FeatureServer) -> None:
    """It sends nothing before health is SERVING; a failure ends it with the error and a code."""
    check_waits([client], late_server)


@pytest.mark.usefixtures("client")
def test_its_own_checks_pass() -> None:
    """Its tests pass."""
    run("ctest", "--test-dir", BUILD)
