"""Gradients of every layer of real architectures, beside float64 autograd without in-place code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hfnets
import layertap
from gradient_oracle import not_in_place, with_gradients
from layertap import LocalModel
from layertap.extraction.containers import flatten, replaced
from layertap.extraction.points import CapturePoint, PointKind
from layertap.selection import Capture

TOLERANCE = 1e-4


class Oracle:
    """One pass of a float64 copy of a module, with the gradient of each value of each call."""

    def __init__(self, module: nn.Module, points: list[CapturePoint]) -> None:
        self._wanted = {
            (point.path, point.capture, point.call, point.member): point for point in points
        }
        self._calls: dict[tuple[str, Capture], int] = {}
        self._values: dict[CapturePoint, torch.Tensor] = {}
        self.net = not_in_place(module).double().requires_grad_(True)
        for path, part in self.net.named_modules():
            part.register_forward_pre_hook(self._before(path), with_kwargs=True)
            part.register_forward_hook(self._after(path))

    def _before(self, path: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if len(args) == 1 and not kwargs:
                return (self._watched(path, Capture.INPUT, args[0]),), {}
            self._watched(path, Capture.INPUT, None)
            return None

        return hook

    def _after(self, path: str) -> Callable[..., Any]:
        return lambda _, args, output: self._watched(path, Capture.OUTPUT, output)

    def _watched(self, path: str, side: Capture, value: Any) -> Any:
        call = self._calls.get((path, side), 0)
        self._calls[path, side] = call + 1
        for way, tensor in list(flatten(value)):
            point = self._wanted.get((path, side, call, way))
            if point is None or not tensor.is_floating_point():
                continue
            # Another tensor than any that the model has.
            self._values[point] = copied = tensor + 0
            if copied.requires_grad:
                copied.retain_grad()
            value = replaced(value, way, copied)
        return value

    def gradients(self, score: torch.Tensor) -> dict[CapturePoint, torch.Tensor]:
        """Return the gradient of a score with respect to each value on which it depends."""
        score.backward()
        return {p: v.grad for p, v in self._values.items() if v.grad is not None}


def compare(model: LocalModel, x: Any, run: Callable[[nn.Module], torch.Tensor], aim: str) -> int:
    """Compare every gradient that the oracle has; return how many there were."""
    names: dict[CapturePoint, str] = {}
    for entry in model.host.catalogue:
        for side, point in entry.points.items():
            spec = entry.specs[side]
            own = spec.dtype.is_floating_point and spec.batch_axis is not None
            if point.kind is PointKind.MODULE and own and point.path:
                suffix = "gradient" if side is Capture.OUTPUT else "input_gradient"
                names.setdefault(point, f"{entry.name}:{suffix}")
    with with_gradients():
        oracle = Oracle(copy.deepcopy(model.host.model.module), list(names))
        expected = oracle.gradients(run(oracle.net))
    layers = [names[point] for point in expected]
    found = model.extract(x, layers, objective=aim)
    faults = {}
    for point, true in expected.items():
        value = found[names[point]].double()
        assert value.shape == true.shape
        scale = float(true.abs().max())
        error = float((value - true).abs().max())
        if error > TOLERANCE * scale:
            faults[names[point]] = error, scale
    assert not faults
    return len(expected)


@pytest.mark.parametrize(
    ("name", "side", "fewest"),
    [
        pytest.param("resnet18", 64, 120, marks=pytest.mark.long),
        pytest.param("mobilenet_v3_small", 64, 300, marks=pytest.mark.long),
        ("vit_b_16", 32, 0),
    ],
)
def test_every_layer_of_a_vision_model(name: str, side: int, fewest: int) -> None:
    """Outputs and inputs of every call have the gradients of a float64 oracle."""
    if name == "vit_b_16":
        source, shape = "gradnets:tiny_vit", (3, 32, 32)
    else:
        source, shape = name, (3, side, side)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))
    with layertap.load(source, weights="random", item_shape=shape, device="cpu") as model:
        count = compare(model, x, lambda net: net(x.double())[:, 1].sum(), "[1]")
    assert count > fewest


@pytest.mark.parametrize("name", ["BertModel", "GPT2Model"])
def test_every_layer_of_a_text_model(name: str, tmp_path: Path) -> None:
    """The same holds for transformers, whose modules return tuples and dataclasses."""
    settings = hfnets.TEXT
    if name == "GPT2Model":
        settings = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
    hfnets.saved(tmp_path, name, **settings)
    ids = np.array([[1, 5, 9, 33, 2, 7], [3, 3, 60, 8, 1, 0]])

    def run(net: nn.Module) -> torch.Tensor:
        out = net(input_ids=torch.from_numpy(ids))
        states: torch.Tensor = out.last_hidden_state
        return (states[:, 2, 3]).sum()

    with layertap.load(f"hf:{tmp_path}", device="cpu") as model:
        count = compare(model, {"input_ids": ids}, run, "output.last_hidden_state[2,3]")
    assert count > 30
