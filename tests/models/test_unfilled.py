"""Modules that get weights from a file draw no random numbers, and are what they were before."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from layertap.models import ModelSpec, load_model
from layertap.models.seeding import seeded
from layertap.models.unfilled import built_with_weights

CPU = torch.device("cpu")


MODELS: dict[str, dict[str, object]] = {
    "mobilenet_v3_small": {},
    "shufflenet_v2_x0_5": {},
    "squeezenet1_1": {},
    "mnasnet0_5": {},
    "fasterrcnn_mobilenet_v3_large_fpn": {"weights_backbone": None},
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"init_weights": False},
    "lraspp_mobilenet_v3_large": {"weights_backbone": None},
    "maxvit_t": {},
    "mvit_v2_s": {},
    "swin_v2_t": {},
    "vit_b_32": {},
}
QUICK = 3
"""Models that the quick tests take."""


@pytest.mark.parametrize(
    "name",
    [
        *list(MODELS)[:QUICK],
        *(pytest.param(n, marks=pytest.mark.long) for n in list(MODELS)[QUICK:]),
    ],
)
def test_a_model_with_a_file_is_the_one_that_torchvision_makes(name: str, tmp_path: Path) -> None:
    """Every parameter and buffer, those that no state dict holds as well."""
    with seeded(7):
        plain = get_model(name, weights=None, **MODELS[name]).eval()
    file = tmp_path / "weights.pth"
    torch.save(plain.state_dict(), file)
    loaded = load_model(ModelSpec(name, weights=str(file)), CPU).module
    for kind in ("named_parameters", "named_buffers"):
        expected, got = dict(getattr(plain, kind)()), dict(getattr(loaded, kind)())
        assert got.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(got[key], expected[key])] == []


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_no_numbers_are_drawn(name: str) -> None:
    """torch's generator is where it was, although these models fill their parameters."""
    with torch.device("meta"):
        given = {
            key: torch.full(value.shape, 0.5, dtype=value.dtype, device="cpu")
            for key, value in get_model(name).state_dict().items()
        }

    def build() -> nn.Module:
        module = get_model(name)
        module.load_state_dict(given)
        return module

    before = torch.default_generator.get_state()
    module = built_with_weights(build)
    assert torch.equal(torch.default_generator.get_state(), before)
    assert all((value == 0.5).all() for value in module.parameters())


def test_a_module_without_all_weights_is_built_as_usual() -> None:
    """A parameter that nothing was copied to has the numbers of its seed."""
    times = 0

    def build() -> nn.Module:
        nonlocal times
        times += 1
        with seeded(3):
            module = nn.Sequential(nn.Linear(64, 64), nn.Embedding(4, 8))
        module.load_state_dict({"0.bias": torch.ones(64)}, strict=False)
        return module

    module = built_with_weights(build)
    assert times == 2
    expected = build().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())


def test_other_threads_and_later_modules_are_filled() -> None:
    """What is left out is left out in that block of that thread only."""

    def build() -> nn.Module:
        made: list[nn.Module] = []
        thread = threading.Thread(target=lambda: made.append(nn.Linear(64, 64)))
        torch.manual_seed(5)
        thread.start()
        thread.join()
        other = made[0]
        assert isinstance(other, nn.Linear)
        assert 0 < other.weight.std() < 1
        mine = nn.Linear(2, 2)
        mine.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
        return mine

    built_with_weights(build)
    before = torch.default_generator.get_state()
    nn.Linear(4, 4)
    assert not torch.equal(torch.default_generator.get_state(), before)
