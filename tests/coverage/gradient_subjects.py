"""The models whose gradients are proven: torchvision's classifiers, and Hugging Face architectures.

They are built by factories, so that the reference and layertap have the same weights in float64 and
in float32. Weights are random, and batch norms have statistics of their own.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import nn

__all__ = ["GradientSubject", "classifier", "classifiers", "hugging_face"]

Batch = torch.Tensor | dict[str, torch.Tensor]

SIDES = {
    "maxvit_t": 224,  # its windows need it
    "vit_h_14": 56,
    "inception_v3": 96,
    "alexnet": 96,
}
"""Heights and widths of images; 64 for all others."""


@dataclass(frozen=True)
class GradientSubject:
    """A model under proof.

    Attributes:
        name: Its name.
        group: ``"torchvision"`` or ``"transformers"``.
        build: Makes an instance in float32, always with the same weights.
        item: The sizes of an item of the only input; None where the factory declares its inputs.
        batch: A batch of two items.
        inputs: What the model takes, as a factory declares it.
    """

    name: str
    group: str
    build: Callable[[], nn.Module]
    item: tuple[int, ...] | None
    batch: Batch
    inputs: dict[str, str] | None = None

    def on(self, device: str) -> GradientSubject:
        """Return the same with its batch on a device, to run a module there."""
        if isinstance(self.batch, torch.Tensor):
            return replace(self, batch=self.batch.to(device))
        return replace(self, batch={name: each.to(device) for name, each in self.batch.items()})

    def batch_of(self, size: int, dtype: torch.dtype) -> Batch:
        """Return the first items of the batch, with floats of a dtype."""

        def part(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor[:size].clone()
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        if isinstance(self.batch, torch.Tensor):
            return part(self.batch)
        return {name: part(tensor) for name, tensor in self.batch.items()}

    def run(self, net: nn.Module, size: int, dtype: torch.dtype) -> Any:
        """Run a module on the first items of the batch."""
        given = self.batch_of(size, dtype)
        return net(given) if isinstance(given, torch.Tensor) else net(**given)

    def factory(self, dtype: torch.dtype) -> Callable[[], nn.Module]:
        """Return a factory of instances of a dtype, as ``layertap.load`` takes one."""

        def build() -> nn.Module:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                torch.manual_seed(7)
                return _settled(self.build()).to(dtype).eval().requires_grad_(False)

        if self.inputs:
            own = str(dtype).removeprefix("torch.")
            build.inputs = {  # type: ignore[attr-defined]
                name: text.replace("float32", own) for name, text in self.inputs.items()
            }
        return build


def classifiers() -> list[GradientSubject]:
    """Return torchvision's classification models, small ones first."""
    names = torchvision.models.list_models(torchvision.models)
    return [classifier(name, SIDES.get(name, 64)) for name in sorted(names, key=_parameters)]


def _parameters(name: str) -> int:
    """Return how many parameters a model has, as torchvision says it."""
    weights = torchvision.models.get_model_weights(name)
    return int(next(iter(weights)).meta["num_params"])


def classifier(name: str, side: int) -> GradientSubject:
    """Return a classification model of torchvision for square images."""
    options: dict[str, Any] = {"weights": None}
    if name.startswith("vit_"):
        options["image_size"] = side
    if name in {"googlenet", "inception_v3"}:
        options["init_weights"] = False
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    return GradientSubject(
        name,
        "torchvision",
        lambda: torchvision.models.get_model(name, **options),
        (3, side, side),
        images,
    )


def hugging_face() -> list[GradientSubject]:
    """Return the architectures of ``tests/packages/huggingface.py``."""
    from packages.subject import subjects_in

    found = []
    for subject in subjects_in(importlib.import_module("packages.huggingface")):
        batches = [_named(request) for request in subject.requests]
        # One with several items, and with a mask where the model takes one.
        batch = max(batches, key=lambda each: (_size(each) > 1, len(each)))
        found.append(
            GradientSubject(
                subject.name,
                "transformers",
                _provable(subject.name, subject.build),
                subject.item,
                batch.get("", batch) if "" in batch else batch,
                getattr(subject.build, "inputs", None),
            )
        )
    return found


def _provable(name: str, build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a factory of the same model that runs in float64 and gives the same values again."""
    change = {"mixtral": _with_experts_in_python, "vilt": _with_patches_in_order}.get(name)
    return build if change is None else lambda: change(build())


def _with_experts_in_python(net: Any) -> nn.Module:
    """Let a loop run the experts, as PyTorch's grouped product takes no float64."""
    net.set_experts_implementation("eager")
    return net


def _with_patches_in_order(net: Any) -> nn.Module:
    """Let ViLT take an image's patches in their order; it draws another order in each pass."""
    net.embeddings.visual_embed = functools.partial(_visual_embed_in_order, net.embeddings)
    return net


def _visual_embed_in_order(embeddings: Any, *args: Any, **kwargs: Any) -> Any:
    def in_order(weights: torch.Tensor, count: int, replacement: bool = False) -> torch.Tensor:
        del replacement
        return torch.arange(count) % len(weights)

    with mock.patch.object(torch, "multinomial", in_order):
        return type(embeddings).visual_embed(embeddings, *args, **kwargs)


def _named(request: Any) -> dict[str, torch.Tensor]:
    return {"": request} if isinstance(request, torch.Tensor) else dict(request)


def _size(batch: dict[str, torch.Tensor]) -> int:
    return len(next(iter(batch.values())))


def _settled(net: nn.Module) -> nn.Module:
    """Give batch norms statistics and heads weights: new ones would hide faults.

    A new batch norm is almost the identity, and a head of zeros makes every gradient zero.
    """
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.7, 1.4)
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.05)
    return net
