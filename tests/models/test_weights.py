from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torchvision.models import mnasnet0_5

from layertap.errors import WeightsUnavailableError
from layertap.models.weights import load_into

StateDict = Mapping[str, torch.Tensor]


def test_mismatched_keys_are_named(tiny_net: nn.Module) -> None:
    """Missing and unexpected keys are both named."""
    state = dict(tiny_net.state_dict())
    state["9.weight"] = state.pop("0.weight")

    with pytest.raises(WeightsUnavailableError) as caught:
        load_into(tiny_net, state, "w.pth")

    assert "w.pth don't fit the model" in str(caught.value)
    assert "missing: 0.weight; not in the model: 9.weight" in str(caught.value)


def test_keys_that_the_model_lacks_are_refused(tiny_net: nn.Module) -> None:
    """A file with more than the model's keys is another model's, even if no key is missing."""
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
    """Files older than torch 0.4.1 lack ``num_batches_tracked``, which inference never reads."""
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
    """Quantised weights would load as the integers as which they are stored."""
    state = {key: value.to(dtype) for key, value in tiny_net.state_dict().items()}
    with pytest.raises(WeightsUnavailableError, match=f"types differ: .* is {dtype}, the model"):
        load_into(tiny_net, state, "w.pth")


def test_weights_of_another_precision_load(tiny_net: nn.Module) -> None:
    """Half-precision files are converted, and so are counters stored as floating-point numbers."""
    state = {key: value.to(torch.float16) for key, value in tiny_net.state_dict().items()}
    load_into(tiny_net, state, "w.pth")
    assert all(torch.equal(v.to(torch.float16), state[k]) for k, v in tiny_net.state_dict().items())
