"""Gradients, interventions, reductions and models of text have the CPU's values on a GPU.

The models compute in float64, so the two devices agree to its rounding and any larger difference
is a fault. ``tests/engine/test_cuda.py`` compares activations in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import gradnets
import layertap
from devices import needs_cuda
from layertap import Extractor, Intervention, LayerSelection, LocalModel, Objective, Sweep

pytestmark = needs_cuda

CLOSE = 1e-10
"""The largest difference, as a share of the layer's largest magnitude."""

BATCH = 3


def _images(side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(BATCH, 3, side, side, dtype=torch.float64, generator=generator)


def _ids(length: int, most: int) -> torch.Tensor:
    return torch.randint(1, most, (BATCH, length), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Net:
    """A model and a batch for it."""

    factory: str
    batch: Any
    settings: dict[str, Any] = field(default_factory=dict)


def _text(most: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(BATCH, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    return {"input_ids": _ids(12, most), "attention_mask": mask}


NETS = {
    "residual": Net(
        "gradnets:residual",
        _images(8),
        {"item_shape": gradnets.IMAGE, "input_dtype": "float64"},
    ),
    "resnet18": Net(
        "doublenets:resnet18", _images(32), {"item_shape": (3, 32, 32), "input_dtype": "float64"}
    ),
    "gpt2": Net("doublenets:gpt2", _ids(12, 60), {"item_shape": (12,), "input_dtype": "int64"}),
    "bert": Net("doublenets:bert", _text(60)),
    "masked": Net("doublenets:masked", _text(8)),
}


@dataclass
class Pair:
    """One model on both devices."""

    cpu: LocalModel
    cuda: LocalModel
    batch: Any

    def agree(self, layers: Any, **request: Any) -> dict[str, torch.Tensor]:
        """Send a request to both, compare every tensor of the results, and return the GPU's."""
        there = self.cuda.extract(self.batch, layers, **request)
        here = self.cpu.extract(self.batch, layers, **request)
        assert list(there) == list(here)
        for name, expected in here.items():
            value = there[name]
            assert value.shape == expected.shape, name
            assert value.dtype == expected.dtype, name
            if not expected.is_floating_point():
                assert torch.equal(value, expected), name
                continue
            scale = float(expected.double().abs().max())
            error = float((value.double() - expected.double()).abs().max())
            tolerance = max(CLOSE, 4 * torch.finfo(expected.dtype).eps)
            assert error <= tolerance * scale, f"{name}: {error:.1e} of {scale:.1e}"
        return dict(there)


@pytest.fixture(scope="module")
def pairs() -> Iterator[dict[str, Pair]]:
    """Every net on both devices."""
    with ExitStack() as stack:
        loaded = {}
        for name, net in NETS.items():
            cpu, cuda = (
                stack.enter_context(layertap.load(net.factory, device=device, **net.settings))
                for device in ("cpu", "cuda")
            )
            assert cuda.host.model.device.type == "cuda"
            loaded[name] = Pair(cpu, cuda, net.batch)
        yield loaded


GRADIENTS = {
    "element": ("residual", ["conv1:gradient", "relu_1:gradient"], "fc[2]"),
    "maximum": ("resnet18", ["layer1:gradient", "layer4:input_gradient"], "fc[maximum]"),
    "per item": ("resnet18", ["layer3:gradient"], Objective.element("fc", [1, 2, 3])),
    "difference": ("resnet18", ["layer2.0.bn1:gradient"], "fc[1] - fc[2]"),
    "log-probability": ("gpt2", ["transformer.wte:gradient"], "lm_head[log_probability 4, 7]"),
    "norm": ("bert", ["embeddings:gradient", "encoder.layer.1:gradient"], "pooler[norm]"),
    "masked": ("masked", ["embed:gradient"], "head[sum]"),
    "vector": (
        "resnet18",
        ["layer4:gradient"],
        Objective.dot("fc", np.linspace(-1, 1, 10)),
    ),
    "model's input": ("resnet18", ["inputs.x:gradient"], "fc[3]"),
    "maps": (
        "resnet18",
        [f"layer3:{way}" for way in ("grad_cam", "hires_cam", "layer_cam", "grad_cam_plus_plus")],
        "fc[maximum]",
    ),
    "resized map": ("resnet18", ["layer2:grad_cam:map=resized"], "fc[1]"),
    "guided": ("resnet18", ["layer1:guided_backpropagation"], "fc[1]"),
    "integrated": (
        "residual",
        [LayerSelection("conv1", "gradient", method="integrated_gradients", sweep=Sweep(steps=7))],
        "fc[1]",
    ),
    "smooth": (
        "residual",
        [LayerSelection("conv1", "gradient", method="smooth_grad", sweep=Sweep(steps=5, seed=3))],
        "fc[1]",
    ),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_are_those_of_the_cpu(pairs: dict[str, Pair], case: str) -> None:
    """Each objective and each attribution gives the same numbers on both devices."""
    net, layers, objective = GRADIENTS[case]
    found = pairs[net].agree(layers, objective=objective)
    assert any(float(value.abs().max()) > 0 for value in found.values())


DIRECTION = np.linspace(-1, 1, 512)

INTERVENTIONS: dict[str, tuple[str, Any, Any]] = {
    "zero": ("resnet18", ["layer4", "fc"], "layer4:channel=3:zero"),
    "mean": ("resnet18", "fc", Intervention.mean("layer2", ["y", "x"])),
    "add": ("resnet18", "fc", Intervention.add("layer4", DIRECTION, factor=0.5)),
    "replace": ("resnet18", "fc", Intervention.replace("layer4", np.ones((512, 1, 1)))),
    "patch": ("resnet18", ["layer3", "fc"], Intervention.patch("layer2", 1, item=0)),
    "project": ("resnet18", "fc", Intervention.project_out("layer4", DIRECTION)),
    "cap": ("resnet18", "fc", Intervention.cap("layer4", DIRECTION, low=-0.01, high=0.01)),
    "noise": ("resnet18", ["layer4", "fc"], Intervention.noise("layer4", 0.1, seed=5)),
    "skip": ("gpt2", "lm_head", Intervention.skip("transformer.h.1.mlp.act")),
    "token": ("gpt2", "lm_head", Intervention.scale("transformer.h.1", 2.0, token=-1)),
    "head": ("bert", "pooler", Intervention.zero("encoder.layer.0", channel=range(8))),
    "input": ("resnet18", "fc", Intervention.zero("layer4", channel=3).of_input()),
    "sweep": (
        "resnet18",
        ["layer1", "layer4", "fc"],
        [[Intervention.zero("layer3", channel=channel)] for channel in range(6)],
    ),
}


@pytest.mark.parametrize("case", INTERVENTIONS)
def test_interventions_have_the_effect_that_they_have_on_the_cpu(
    pairs: dict[str, Pair], case: str
) -> None:
    """Each operation, each axis, and a sweep give the same numbers on both devices."""
    net, layers, changes = INTERVENTIONS[case]
    found = pairs[net].agree(layers, interventions=changes)
    assert int(found["interventions.changed"].sum()) > 0


def test_a_gradient_of_a_changed_model(pairs: dict[str, Pair]) -> None:
    """Both in one request."""
    pairs["resnet18"].agree(
        "layer4:gradient", objective="fc[1]", interventions="layer3:channel=3:zero"
    )


@pytest.mark.parametrize(
    ("net", "layers"),
    [
        ("resnet18", ["layer2:reduce=global_average_pool", "layer1:dtype=float16"]),
        ("resnet18", ["layer4:eigen_cam", "relu", "layer3:input"]),
        ("bert", ["encoder.layer.1", "embeddings", "pooler"]),
        ("bert", ["encoder.layer.0:reduce=last_token"]),
        ("gpt2", ["transformer.h.2", "transformer.h.0.attn.0"]),
        ("masked", ["embed", "head"]),
    ],
)
@pytest.mark.parametrize("extractor", [Extractor.HOOK, Extractor.AUTO])
def test_values_are_those_of_the_cpu(
    pairs: dict[str, Pair], net: str, layers: list[str], extractor: Extractor
) -> None:
    """Reductions, dtypes, masks and texts of several lengths give the same values."""
    pairs[net].agree(layers, extractor=extractor)


def test_many_kinds_of_requests_at_once(pairs: dict[str, Pair]) -> None:
    """Gradients, interventions and plain requests at once don't disturb one another."""
    pair = pairs["resnet18"]
    asks: list[tuple[Any, dict[str, Any]]] = [
        ("layer2", {"extractor": "hook"}),
        (["layer1:gradient"], {"objective": "fc[maximum]"}),
        (["fc"], {"interventions": "layer4:channel=3:zero"}),
        (["layer3:grad_cam"], {"objective": "fc[1]"}),
        (["fc"], {"interventions": [[f"layer4:channel={channel}:zero"] for channel in range(4)]}),
    ]
    expected = [dict(pair.cuda.extract(pair.batch, layers, **rest)) for layers, rest in asks]

    def ask(number: int) -> None:
        layers, rest = asks[number % len(asks)]
        found = pair.cuda.extract(pair.batch, layers, **rest)
        for name, value in expected[number % len(asks)].items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(60)))
