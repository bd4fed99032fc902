"""A model gets the right state dict of a file, or the file is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import mnasnet0_5

from layertap.errors import WeightsUnavailableError
from layertap.models.weights import load_checkpoint, read_checkpoint

State = Mapping[str, torch.Tensor]


def net(value: float = 0.0) -> nn.Module:
    """Two layers with a batch norm, in which all values are equal."""
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    for tensor in made.state_dict().values():
        tensor.fill_(value)
    return made


class Wrapper(nn.Module):
    """A model whose own names begin with ``module.`` or another such word."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., str]:
    """Save contents, load them into a module, and return the description for clients."""

    def run(contents: Any, module: nn.Module, key: str = "") -> str:
        torch.save(contents, tmp_path / "w.pth")
        return load_checkpoint(module, read_checkpoint(str(tmp_path / "w.pth")), key)

    return run


def value_of(module: nn.Module) -> float:
    """Return the one value of all tensors of a module."""
    values = {float(value) for tensor in module.state_dict().values() for value in tensor.flatten()}
    assert len(values) == 1
    return values.pop()


def prefixed(prefix: str, state: State) -> dict[str, torch.Tensor]:
    """Put a prefix before every name."""
    return {f"{prefix}{key}": value for key, value in state.items()}


def lightning(state: State, **more: Any) -> dict[str, Any]:
    """Return what PyTorch Lightning saves with ``save_weights_only``."""
    return {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}}},
        **more,
    }


WRAPPED: dict[str, Callable[[State], Any]] = {
    "nested": lambda state: {"state_dict": state, "epoch": 3},
    "nested under model": lambda state: {"model": state, "optimizer": {"state": {}}},
    "nested twice": lambda state: {"state_dict": {"model": state}},
    "nested under any name": lambda state: {"weights_of_the_net": state},
    "data parallel": lambda state: prefixed("module.", state),
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "compiled data parallel": lambda state: prefixed("_orig_mod.module.", state),
    "data parallel of a compiled": lambda state: prefixed("module._orig_mod.", state),
    "compiled children": lambda state: {
        key.replace(".", "._orig_mod.", 1): value for key, value in state.items()
    },
    "averaged": lambda state: {"n_averaged": torch.tensor(5), **prefixed("module.", state)},
    "averaged data parallel": lambda state: {
        "n_averaged": torch.tensor(5),
        **prefixed("module.module.", state),
    },
    "lightning": lambda state: lightning(prefixed("model.", state)),
    "lightning by another attribute": lambda state: lightning(prefixed("net.encoder.", state)),
    "lightning, compiled": lambda state: lightning(prefixed("model._orig_mod.", state)),
    "with an optimizer": lambda state: {
        "model": state,
        "optimizer": torch.optim.Adam(net().parameters()).state_dict(),
        "best": torch.tensor(0.5),
    },
    "with an epoch among the tensors": lambda state: {**state, "epoch": 3, "args": ["a"]},
    "twice the same": lambda state: {"model": state, "state_dict": dict(state)},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_what_wrappers_add_is_taken_off(wrap: Callable[[State], Any], load: Any) -> None:
    """Nesting and prefixes of training scripts and wrappers are handled."""
    module = net()

    text = load(wrap(net(3.0).state_dict()), module)

    assert value_of(module) == 3.0
    assert text.startswith("w.pth")


@pytest.mark.parametrize("name", ["module", "model", "_orig_mod", "backbone"])
def test_a_model_whose_own_names_begin_so_is_not_harmed(name: str, load: Any) -> None:
    """Its own state dict can be loaded: alone, nested, and under a wrapper's prefix."""
    state = Wrapper(name, net(2.0)).state_dict()
    for contents in (state, {"state_dict": state}, prefixed("module.", state)):
        module = Wrapper(name, net())
        load(contents, module)
        assert value_of(module) == 2.0


@pytest.mark.parametrize("name", ["module", "_orig_mod"])
def test_a_wrapped_model_takes_the_file_of_what_it_wraps(name: str, load: Any) -> None:
    """A factory that returns DataParallel or a compiled model can load the plain state dict."""
    module = Wrapper(name, net())

    load({"state_dict": net(2.0).state_dict()}, module)

    assert value_of(module) == 2.0


def test_wrapped_models_take_their_own_files(load: Any) -> None:
    """If DataParallel or AveragedModel is the served module, it loads what it saved."""
    for wrap in (nn.DataParallel, AveragedModel):
        module = wrap(net())
        saved = wrap(net(2.0)).state_dict()
        load(saved, module)
        assert torch.equal(module.state_dict()["module.0.weight"], torch.full((4, 3, 3, 3), 2.0))


@pytest.mark.parametrize(
    ("raw", "averaged"),
    [
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        ("params", "params_ema"),
        ("model_state_dict", "ema_state_dict"),
        ("net", "ema"),
    ],
)
def test_ema_weights_are_taken_and_named(raw: str, averaged: str, load: Any) -> None:
    """Of raw and EMA weights the EMA weights are loaded, as in timm, and clients are told."""
    module = net()

    text = load({raw: net(1.0).state_dict(), averaged: net(2.0).state_dict()}, module)

    assert (value_of(module), text) == (2.0, f"w.pth: {averaged}")


def test_an_averaged_model_beside_the_raw_one_is_taken(load: Any) -> None:
    """torchvision's training scripts save an AveragedModel's state dict as ``model_ema``."""
    module = net()

    load(
        {"model": net(1.0).state_dict(), "model_ema": AveragedModel(net(2.0)).state_dict()}, module
    )

    assert torch.equal(module.state_dict()["0.bias"], torch.full((4,), 2.0))


def test_raw_weights_can_be_asked_for(load: Any) -> None:
    """``weights_key`` selects the state dict that it names."""
    module = net()
    contents = {"state_dict": net(1.0).state_dict(), "state_dict_ema": net(2.0).state_dict()}

    assert load(contents, module, "state_dict") == "w.pth: state_dict"
    assert value_of(module) == 1.0


def test_ema_weights_of_another_form_are_not_passed_over_in_silence(load: Any) -> None:
    """If EMA weights can't be read, clients are told that the raw ones were loaded."""
    module = net()
    contents = {"model": net(1.0).state_dict(), "ema": [torch.ones(1)]}

    assert load(contents, module) == "w.pth: model"


def test_teacher_and_student_are_never_chosen_between(load: Any) -> None:
    """Two state dicts that both fit are refused, with the keys that select each."""
    contents = {"teacher": net(1.0).state_dict(), "student": net(2.0).state_dict(), "epoch": 3}
    with pytest.raises(WeightsUnavailableError) as caught:
        load(contents, net())
    assert "weights_key (--weights-key): 'teacher', 'student'" in str(caught.value)

    module = net()
    load(contents, module, "teacher")
    assert value_of(module) == 1.0


def test_ema_weights_beside_other_models_are_not_chosen(load: Any) -> None:
    """EMA weights are chosen only if the other state dict holds the raw weights."""
    contents = {name: net(1.0).state_dict() for name in ("student", "teacher")}
    contents["teacher_ema"] = net(2.0).state_dict()
    contents["teacher"]["0.bias"] = torch.zeros(4)
    with pytest.raises(WeightsUnavailableError, match=": 'student', 'teacher', 'teacher_ema'"):
        load(contents, net())


def test_a_part_of_a_model_is_taken_by_its_prefix(load: Any) -> None:
    """In a self-supervised checkpoint, the teacher's backbone can be named and loaded."""
    teacher = prefixed("backbone.", net(1.0).state_dict()) | {"head.weight": torch.ones(1)}
    student = prefixed("module.backbone.", net(2.0).state_dict())
    contents = {"teacher": teacher, "student": student, "epoch": 3}
    with pytest.raises(WeightsUnavailableError) as caught:
        load(contents, net())
    message = str(caught.value)
    assert "one of 'teacher.backbone', 'student.module.backbone'" in message
    assert "The file holds teacher (" in message
    assert "epoch (int)" in message

    for key, value in (("teacher.backbone", 1.0), ("student.module.backbone", 2.0)):
        module = net()
        assert load(contents, module, key) == f"w.pth: {key}"
        assert value_of(module) == value


def test_the_key_of_an_only_state_dict_may_be_left_out(load: Any) -> None:
    """The prefix alone is enough if the file has one state dict."""
    contents = lightning(prefixed("model.", net(1.0).state_dict()) | {"loss.weight": torch.ones(1)})
    with pytest.raises(
        WeightsUnavailableError, match=r"weights_key .* 'state_dict\.model' would fit"
    ):
        load(contents, net())

    for key in ("state_dict.model", "model"):
        module = net()
        load(contents, module, key)
        assert value_of(module) == 1.0


def test_a_prefix_that_nothing_explains_is_not_guessed(load: Any) -> None:
    """Names with an unknown prefix may be another model's, so the error suggests the key."""
    contents = {"state_dict": prefixed("encoder_q.", net().state_dict())}
    with pytest.raises(WeightsUnavailableError) as caught:
        load(contents, net())
    assert "not in the model: encoder_q.0.weight" in str(caught.value)
    assert "'state_dict.encoder_q' would fit" in str(caught.value)


def test_a_key_that_leads_nowhere_is_refused(load: Any) -> None:
    """The message has the key and what the file holds."""
    with pytest.raises(
        WeightsUnavailableError, match=r"got 'ema', which leads to no state dict. .* model \("
    ):
        load({"model": net().state_dict()}, net(), "ema")


@pytest.mark.parametrize(
    ("contents", "held"),
    [
        (torch.zeros(2), r"tensor \[2\]"),
        ({}, "is empty"),
        ({"lr": 0.1}, r"lr \(float\)"),
        ({"state_dict": {}}, r"state_dict \(dict\)"),
        ([1], "list"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), r"object of torch\.nn\.modules\.container\.Sequential"),
        ({"model": nn.Conv2d(3, 4, 3)}, r"model \(object of torch\.nn\.modules\.conv\.Conv2d\)"),
    ],
)
def test_files_without_a_state_dict_say_what_they_hold(contents: Any, held: str, load: Any) -> None:
    """Whole modules, settings and other values are named, with what was expected."""
    with pytest.raises(WeightsUnavailableError, match=rf"{held}.*; expected a state dict"):
        load(contents, net())


def test_values_that_are_no_tensors_are_named(load: Any) -> None:
    """A name of the model with another value than a tensor is refused."""
    state = dict(net().state_dict()) | {"0.bias": 3}
    with pytest.raises(WeightsUnavailableError, match=r"0\.bias is int, the model has a tensor"):
        load(state, net())


def test_versions_survive_the_renaming(load: Any) -> None:
    """MNASNet converts weights by the version that torch.save keeps, wrapped or not."""
    old = mnasnet0_5(weights=None)
    state = old.state_dict()
    wrapped = nn.DataParallel(old).state_dict()
    assert wrapped._metadata["module"] == {"version": 2}
    module = mnasnet0_5(weights=None)

    load(wrapped, module)

    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    wrapped._metadata["module"] = {"version": None}
    with pytest.raises(WeightsUnavailableError, match="don't fit the model"):
        load(wrapped, mnasnet0_5(weights=None))


class Tied(nn.Module):
    """An embedding that shares its weight with the output layer."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_tied_weights_need_one_name(tmp_path: Path) -> None:
    """safetensors stores a tensor with two names once; a model that ties them can load it."""
    saved = Tied()
    safetensors.torch.save_model(saved, str(tmp_path / "w.safetensors"))
    for key in ("embed.weight", "head.weight"):
        torch.save({key: saved.embed.weight.detach()}, tmp_path / f"{key}.pth")

    for name in ("w.safetensors", "embed.weight.pth", "head.weight.pth"):
        module = Tied()
        load_checkpoint(module, read_checkpoint(str(tmp_path / name)))
        assert torch.equal(module.embed.weight, saved.embed.weight), name
        assert module.head.weight is module.embed.weight


def test_a_model_that_does_not_tie_gets_both(tmp_path: Path) -> None:
    """safetensors records the name that it left out, so both layers get the value."""
    saved = Tied()
    safetensors.torch.save_model(saved, str(tmp_path / "w.safetensors"))
    module = Tied(tied=False)

    load_checkpoint(module, read_checkpoint(str(tmp_path / "w.safetensors")))

    assert torch.equal(module.embed.weight, saved.embed.weight)
    assert torch.equal(module.head.weight, saved.embed.weight)


def test_a_missing_weight_is_not_taken_for_a_tied_one(load: Any) -> None:
    """A model that doesn't tie its weights needs each of them."""
    with pytest.raises(WeightsUnavailableError, match=r"missing: head\.weight"):
        load({"embed.weight": torch.ones(5, 3)}, Tied(tied=False))


def test_tied_weights_that_differ_are_refused(load: Any) -> None:
    """Two values for one tensor can't both be loaded: the last one would silently win."""
    state = {"embed.weight": torch.ones(5, 3), "head.weight": torch.zeros(5, 3)}
    with pytest.raises(WeightsUnavailableError, match="tied weights differ: embed.weight and head"):
        load(state, Tied())


@pytest.mark.filterwarnings("ignore")
def test_quantised_modules_load_what_they_saved(load: Any) -> None:
    """Dynamically quantised layers have more than tensors in their state dict."""
    module = net_with_linear()
    saved = net_with_linear()
    x = torch.rand(2, 4)

    load(saved.state_dict(), module)

    assert torch.equal(module(x), saved(x))


def net_with_linear() -> nn.Module:
    """A dynamically quantised linear layer."""
    return torch.ao.quantization.quantize_dynamic(
        nn.Sequential(nn.Linear(4, 3)), {nn.Linear}, dtype=torch.qint8
    )
