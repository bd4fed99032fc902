from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision.models import mnasnet0_5

from layertap.errors import WeightsUnavailableError
from layertap.models.weights import is_path, load_into, read_state_dict

StateDict = Mapping[str, torch.Tensor]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DEFAULT", False),
        ("IMAGENET1K_V1", False),
        ("ResNet18_Weights.IMAGENET1K_V1", False),
        ("random", False),
        ("w.pth", True),
        ("w.safetensors", True),
        ("./w", True),
        ("/data/w", True),
    ],
)
def test_paths_are_told_from_names(text: str, expected: bool) -> None:
    """A suffix of a weights file or a slash makes a path, anything else is a name."""
    assert is_path(text) is expected


def test_torch_and_safetensors_files_hold_the_same(tiny_net: nn.Module, tmp_path: Path) -> None:
    """Both file formats give the saved tensors back."""
    state = tiny_net.state_dict()
    torch.save(state, tmp_path / "w.pth")
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")

    for name in ("w.pth", "w.safetensors"):
        read = read_state_dict(str(tmp_path / name))
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {}},
        lambda state: {"state_dict": {"model": state}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    ],
)
def test_wrapped_state_dicts_are_unwrapped(
    wrap: Callable[[StateDict], object], tiny_net: nn.Module, tmp_path: Path
) -> None:
    """Training scripts' nesting and wrappers' prefixes are taken off."""
    state = tiny_net.state_dict()
    torch.save(wrap(state), tmp_path / "w.pth")

    assert list(read_state_dict(str(tmp_path / "w.pth"))) == list(state)


def test_a_prefix_that_only_some_keys_have_stays(tmp_path: Path) -> None:
    """A model may have a child called ``module`` beside others."""
    state = {"module.weight": torch.zeros(1), "head.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "w.pth")

    assert list(read_state_dict(str(tmp_path / "w.pth"))) == list(state)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The message says which file isn't there."""
    with pytest.raises(WeightsUnavailableError, match=r"nothing\.pth: no such file"):
        read_state_dict(str(tmp_path / "nothing.pth"))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x80\x02.", b"PK\x03\x04zip"])
def test_foreign_files_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    """A file of another kind is refused with what was expected, whatever its reader trips over."""
    (tmp_path / name).write_bytes(content)

    with pytest.raises(WeightsUnavailableError, match="expected a state dict"):
        read_state_dict(str(tmp_path / name))


class Trap:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    """Only tensors are unpickled: a file that calls a function is refused without the call."""
    torch.save({"weight": Trap(tmp_path / "trapped")}, tmp_path / "w.pth")

    with pytest.raises(WeightsUnavailableError, match="expected a state dict"):
        read_state_dict(str(tmp_path / "w.pth"))
    assert not (tmp_path / "trapped").exists()


def test_a_pickled_module_is_refused(tiny_net: nn.Module, tmp_path: Path) -> None:
    """A whole module is code as well as numbers, so it is no state dict."""
    torch.save(tiny_net, tmp_path / "w.pth")

    with pytest.raises(WeightsUnavailableError, match="expected a state dict"):
        read_state_dict(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("content", [torch.zeros(2), {}, {"lr": 0.1}, {"state_dict": {}}, [1]])
def test_other_saved_values_are_refused(content: object, tmp_path: Path) -> None:
    """A saved tensor, an empty dict or a dict of settings is no state dict."""
    torch.save(content, tmp_path / "w.pth")

    with pytest.raises(WeightsUnavailableError, match="expected a state dict"):
        read_state_dict(str(tmp_path / "w.pth"))


def test_mismatched_keys_are_named(tiny_net: nn.Module) -> None:
    """Missing and unexpected keys are both named."""
    state = dict(tiny_net.state_dict())
    state["9.weight"] = state.pop("0.weight")

    with pytest.raises(WeightsUnavailableError) as caught:
        load_into(tiny_net, state, "w.pth")

    assert "w.pth don't fit the model" in str(caught.value)
    assert "missing: 0.weight; not in the model: 9.weight" in str(caught.value)


def test_keys_that_the_model_lacks_are_refused(tiny_net: nn.Module) -> None:
    """A file with more than the model has is another model's, though nothing is missing."""
    state = dict(tiny_net.state_dict()) | {"head.weight": torch.zeros(1)}

    with pytest.raises(WeightsUnavailableError, match=r"model: not in the model: head\.weight\."):
        load_into(tiny_net, state, "w.pth")


def test_only_the_first_few_of_many_are_named() -> None:
    """A message about thirty keys names five and counts the rest."""
    net = nn.Sequential(*(nn.Linear(1, 1) for _ in range(10)))

    with pytest.raises(WeightsUnavailableError, match=r"2\.weight and 15 more"):
        load_into(net, {"other": torch.zeros(1)}, "w.pth")


def test_mismatched_shapes_are_named(tiny_net: nn.Module) -> None:
    """A key with another shape is named with both shapes, and nothing is loaded."""
    before = tiny_net.state_dict()["0.bias"].clone()
    state = {key: value + 1 for key, value in tiny_net.state_dict().items()}
    state["0.weight"] = torch.zeros(5, 3, 3, 3)

    with pytest.raises(WeightsUnavailableError, match=r"0\.weight is \[5, 3, 3, 3\], the model "):
        load_into(tiny_net, state, "w.pth")
    assert torch.equal(tiny_net.state_dict()["0.bias"], before)


def test_files_without_batch_counters_load(tiny_net: nn.Module) -> None:
    """Files from before torch 0.4.1 lack ``num_batches_tracked``, which inference never reads."""
    state = {
        key: value + 1
        for key, value in tiny_net.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }

    load_into(tiny_net, state, "w.pth")

    assert torch.equal(tiny_net.state_dict()["1.weight"], state["1.weight"])


def test_a_plain_dict_loads_into_a_module_that_wants_a_version() -> None:
    """MNASNet refuses a state dict without the version that torch.save keeps."""
    net = mnasnet0_5(weights=None)
    assert not hasattr(dict(net.state_dict()), "_metadata")

    load_into(net, dict(net.state_dict()), "w.safetensors")
    load_into(net, OrderedDict(net.state_dict()), "w.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.complex64])
def test_weights_of_another_kind_are_refused(tiny_net: nn.Module, dtype: torch.dtype) -> None:
    """Quantised weights would load as the whole numbers that they are stored as."""
    state = {key: value.to(dtype) for key, value in tiny_net.state_dict().items()}
    with pytest.raises(WeightsUnavailableError, match=f"types differ: .* is {dtype}, the model"):
        load_into(tiny_net, state, "w.pth")


def test_weights_of_another_precision_load(tiny_net: nn.Module) -> None:
    """Half-precision files are converted, counters stored as floating-point numbers as well."""
    state = {key: value.to(torch.float16) for key, value in tiny_net.state_dict().items()}
    load_into(tiny_net, state, "w.pth")
    assert all(torch.equal(v.to(torch.float16), state[k]) for k, v in tiny_net.state_dict().items())
