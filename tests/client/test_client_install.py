"""A client-only installation lacks what runs models: no PyTorch, Pillow or Prometheus."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from kept import kept
from layertap.cli.main import _SERVER_PARTS
from layertap.engine import Engine
from layertap.models import ModelSpec
from serving import running_server
from tinynets import ITEM

HOME = Path(__file__).resolve().parents[2]
PHOTO = HOME / "examples" / "images" / "grace_hopper.jpg"

# What the extra installs is hidden, as it is absent where the extra was not installed.
HIDE = """
import sys
from importlib.abc import MetaPathFinder

class Hide(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hide())
"""
ASK = """
import numpy as np
from layertap import Client

address, photo = sys.argv[1:]
with Client(address) as client:
    x = np.ones((2, 3, 16, 16), np.float32)
    print(client.extract("residual", x, "layer1", extractor="hook")["layer1"].shape)
    print(client.extract("residual", photo, "avgpool", extractor="hook")["avgpool"].shape)
    print(client.describe_model("residual").model.inputs[0].name)
"""
COMMAND = """
from layertap.cli.main import main

main(sys.argv[1:])
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script that can't import the modules of the extra."""
    code = HIDE.format(hidden=_SERVER_PARTS) + script
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server with a tiny net."""
    engine = Engine(threads=1, plan_cache=kept())
    try:
        engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
        with running_server(engine) as address:
            yield address
    finally:
        engine.close()


def test_a_client_asks_without_the_server_s_parts(address: str) -> None:
    """Arrays and image files can be sent, and values arrive."""
    done = run(ASK, address, str(PHOTO))
    assert done.stderr == ""
    assert done.stdout.split("\n") == ["(2, 8, 8, 8)", "(1, 16, 1, 1)", "x", ""]


def test_commands_ask_a_server_without_the_server_s_parts(address: str, tmp_path: Path) -> None:
    """``layers`` and ``extract`` with --server need none of these modules."""
    shown = run(COMMAND, "layers", "residual", "--server", address)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "layer1" in shown.stdout
    file = tmp_path / "out.npz"
    saved = run(
        COMMAND, "extract", "residual", str(PHOTO), "-l", "avgpool", "-o", str(file),
        "--server", address,
    )  # fmt: skip
    assert saved.returncode == 0, saved.stderr
    assert file.stat().st_size > 0


@pytest.mark.parametrize(
    "command",
    [
        ["serve", "resnet18"],
        ["layers", "resnet18"],
        ["extract", "resnet18", str(PHOTO), "-l", "fc", "-o", "out.npz"],
    ],
    ids=lambda command: command[0],
)
def test_commands_that_run_models_name_the_extra(command: list[str], tmp_path: Path) -> None:
    """Without the extra these commands say what to install, without a traceback."""
    done = run(f"import os\nos.chdir({str(tmp_path)!r})\n{COMMAND}", *command)
    assert done.returncode == 1
    assert "pip install 'layertap[server]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_extra_installs_what_is_hidden_here() -> None:
    """The list of hidden modules and the extra's packages agree."""
    project = tomllib.loads((HOME / "pyproject.toml").read_text("utf-8"))["project"]
    extra = project["optional-dependencies"]["server"]
    packages = {requirement.partition(">")[0] for requirement in extra}
    assert not packages & {each.partition(">")[0] for each in project["dependencies"]}
    modules = {"PIL": "pillow", "prometheus_client": "prometheus-client"}
    assert packages == {modules.get(part, part) for part in _SERVER_PARTS}
