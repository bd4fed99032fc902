"""The client in Java, built by Maven and run against a real server."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from layertap.app.server import FeatureServer
from reference import EXAMPLES, check, check_waits

FOLDER = EXAMPLES / "java"

# A first build fetches Maven's plugins, protoc and gRPC.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def client() -> list[str]:
    """The command that runs the built program."""
    java, javac, mvn = map(shutil.which, ("java", "javac", "mvn"))
    if java is None or javac is None:
        pytest.skip("there is no JDK: java and javac, 17 or later")
    if mvn is None:
        pytest.skip("mvn is not installed: https://maven.apache.org")
    subprocess.run(
        [mvn, "--batch-mode", "--quiet", "package"], cwd=FOLDER, check=True, timeout=1100
    )
    return [java, "-jar", str(FOLDER / "target" / "client.jar")]


def test_prints_what_the_python_client_gets(client: list[str], address: str) -> None:
    """Shapes, types, values and the error equal those of the Python client."""
    check(client, address, "resnet18")


def test_receives_large_replies(client: list[str], address: str) -> None:
    """Replies over gRPC's default limit of 4 MB arrive."""
    check(client, address, "large")


def test_waits_until_ready(client: list[str], late_server: FeatureServer) -> None:
    """It sends no request before the server is SERVING."""
    check_waits(client, late_server)
