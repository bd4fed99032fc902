from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from batches import batch_for
from layertap.errors import ModelLoadError, WeightsUnavailableError
from layertap.models import ModelSpec, load_model
from layertap.models.torchscript_source import build_torchscript


def trace(net: nn.Module) -> torch.jit.ScriptModule:
    """Trace a net that takes images of 8 x 8 pixels."""
    return torch.jit.trace(net, torch.rand(1, 3, 8, 8))


@pytest.fixture(params=[trace, torch.jit.script, lambda net: torch.jit.freeze(trace(net))])
def saved(request: pytest.FixtureRequest, tiny_net: nn.Module, tmp_path: Path) -> Path:
    """The tiny net as a traced, a scripted and a frozen file."""
    make: Callable[[nn.Module], torch.jit.ScriptModule] = request.param
    with warnings.catch_warnings():
        # Torch deprecates TorchScript, and warns about a first call on another thread.
        warnings.simplefilter("ignore")
        torch.jit.save(make(tiny_net), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def test_a_file_runs_as_its_module(saved: Path, tiny_net: nn.Module) -> None:
    """A loaded file computes the same values as the module that it was made from."""
    model = load_model(ModelSpec(str(saved), item_shape=(3, 8, 8)))
    x = torch.rand(2, 3, 8, 8)

    with torch.inference_mode():
        torch.testing.assert_close(model.forward(batch_for(model, x)), tiny_net(x))


def test_clients_read_the_base_name_only(saved: Path) -> None:
    """The source and the weights that clients read contain no directory."""
    model = load_model(ModelSpec(str(saved), item_shape=(3, 8, 8)))

    assert (model.name, model.source, model.weights) == ("net", "torchscript:net.pt", "net.pt")


def test_parameters_need_no_gradients(saved: Path) -> None:
    """No parameter requires gradients, and the module is in eval mode."""
    model = load_model(ModelSpec(str(saved), item_shape=(3, 8, 8)))

    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert not any(getattr(part, "training", False) for part in model.module.modules())


@pytest.mark.parametrize(
    ("weights", "reason"),
    [("random", "make no sense"), ("IMAGENET1K_V1", "IMAGENET1K_V1"), ("w.pth", "w.pth")],
)
def test_other_weights_are_refused(weights: str, reason: str) -> None:
    """A TorchScript file contains its weights, and the error says so."""
    with pytest.raises(WeightsUnavailableError, match=f"net.pt: .* has its own.*{reason}"):
        build_torchscript(ModelSpec("net.pt", weights=weights))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The message says which file isn't there."""
    with pytest.raises(ModelLoadError, match=r"none\.pt: no such file"):
        build_torchscript(ModelSpec(str(tmp_path / "none.pt")))


@pytest.mark.parametrize("kind", ["state dict", "text", "empty"])
def test_other_files_are_refused(kind: str, tiny_net: nn.Module, tmp_path: Path) -> None:
    """A state dict or any other file is refused, with how to use a state dict."""
    path = tmp_path / "w.pt"
    if kind == "state dict":
        torch.save(tiny_net.state_dict(), path)
    else:
        path.write_text("hello" if kind == "text" else "")

    with pytest.raises(ModelLoadError, match=r"w\.pt: torch can't load it as one.*--weights"):
        build_torchscript(ModelSpec(str(path)))
