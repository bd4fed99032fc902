"""Which modules are imported, and when."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import layertap

TESTS = Path(__file__).resolve().parents[1]


def run(code: str) -> str:
    """Run code in its own process, in which the tests' nets can be imported."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_layertap_imports_neither_torch_nor_grpc() -> None:
    """Nor numpy nor protobuf: each name imports what it needs when it is first used."""
    heavy = "{'torch', 'torchvision', 'grpc', 'google.protobuf', 'numpy'}"
    assert run(f"import sys, layertap; print({heavy} & set(sys.modules))") == "set()\n"


@pytest.mark.long
def test_a_model_in_this_process_needs_no_messages() -> None:
    """Tensors, images, the catalogue, `layers` and `extract` need no gRPC and no generated code."""
    code = """
import sys, layertap, torch
from PIL import Image
unwanted = ("grpc", "google.protobuf", "layertap.v1", "layertap.client", "layertap.services")
settings = {"item_shape": [3, 16, 16], "device": "cpu", "layers": "conv1"}
with layertap.load("tinynets:residual", **settings) as net:
    assert net.extract(torch.rand(2, 3, 16, 16), "layer*")["layer1"].shape == (2, 8, 8, 8)
    assert net.extract(Image.new("RGB", (16, 16)), "fc")["fc"].shape == (1, 5)
    assert net.describe().layers
print("library", [name for name in sys.modules if name.startswith(unwanted)])
from click.testing import CliRunner
from layertap.cli.main import main
net = ["tinynets:residual", "--item-shape", "3,16,16", "--device", "cpu"]
with CliRunner().isolated_filesystem():
    Image.new("RGB", (16, 16)).save("a.png")
    for args in (["layers", *net], ["extract", *net, "a.png", "-l", "fc", "-o", "a.npz"]):
        result = CliRunner().invoke(main, args, catch_exceptions=False)
        assert result.exit_code == 0, result.output
print("commands", [name for name in sys.modules if name.startswith(unwanted)])
"""
    assert run(code) == "library []\ncommands []\n"


@pytest.mark.parametrize("name", layertap.__all__)
def test_every_public_name_is_there(name: str) -> None:
    """Each name of ``__all__`` can be imported, and is listed."""
    assert getattr(layertap, name) is not None
    assert name in dir(layertap)


def test_another_name_is_an_attribute_error() -> None:
    """It is the same error as for any module."""
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        layertap.nothing  # noqa: B018 - reading it is what is tested


def test_without_torch_the_error_names_the_extra() -> None:
    """``layertap.load`` says what to install; the client works without torch."""
    code = """
import sys
sys.modules["torch"] = None
import layertap
layertap.Client
try:
    layertap.load
except ModuleNotFoundError as error:
    print(error.name, error)
"""
    assert run(code) == (
        "torch layertap.load is for models in this process, which need torch; install it with: "
        "pip install 'layertap[server]'\n"
    )
