"""A loaded model: a module in eval mode on its device, and its inputs."""

from __future__ import annotations

from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from layertap.models.batch import Batch
from layertap.models.preprocess import Preprocess, fitted
from layertap.models.signature import InputSpec, Signature

__all__ = ["Built", "LoadedModel"]


@dataclass(frozen=True, slots=True)
class Built:
    """What a source hands to ``load_model``: the module on the CPU, and the facts about it.

    The fields are those of `LoadedModel`, and:

    Attributes:
        preprocess_is_code: Whether the preprocessing stands in the model's own code, and so wins
            over a configuration alongside its weights.
        in_precision: Whether the module has the spec's precision already.
    """

    module: nn.Module
    source: str
    weights: str
    input: InputSpec
    preprocess: Preprocess | None = None
    takes_list: bool = False
    preprocess_is_code: bool = False
    in_precision: bool = False


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        name: What requests call it.
        source: Where it comes from, such as ``"torchvision:resnet18"``; shown to clients, so never
            a directory.
        weights: Which weights it has, such as ``"ResNet18_Weights.IMAGENET1K_V1"``,
            ``"random (seed 0)"`` or a file's base name; shown to clients.
        module: In eval mode, without gradients, on ``device``.
        device: Where the module is and its input must be.
        signature: The tensors it takes.
        preprocess: Makes an item of the first input of an image; None if the model takes no
            images.
        takes_list: Whether the module takes a list of ``[C, H, W]`` instead of a batch, as
            torchvision's detection models do.
        differentiates: Whether the module differentiates inside its forward, which inference mode
            forbids: its passes run under ``torch.no_grad`` instead.
    """

    name: str
    source: str
    weights: str
    module: nn.Module
    device: torch.device
    signature: Signature
    preprocess: Preprocess | None = None
    takes_list: bool = False
    differentiates: bool = False

    def forward(self, batch: Batch) -> Any:
        """Call the module on a batch that is on ``device``, and return its result.

        Gradient mode is the caller's business, except for a module that differentiates; whatever
        the module raises passes through. What the module sets of context variables ends with the
        call, as a pass that ends early would leave it set for the next one.
        """
        return copy_context().run(self._call, batch)

    def _call(self, batch: Batch) -> Any:
        if not self.differentiates:
            return self.module(*self.arguments(batch))
        with torch.inference_mode(False), torch.no_grad():
            # A tensor that was made in inference mode can't require a gradient; its copy can.
            plain = batch.map(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)
            return self.module(*self.arguments(plain))

    def arguments(self, batch: Batch) -> tuple[Any, ...]:
        """Return what the module's ``forward`` is called with for a batch."""
        if self.takes_list:
            return (list(batch.only.unbind(0)),)
        return tuple(batch[spec.name] for spec in self.signature.inputs)

    def with_input(self, found: InputSpec) -> LoadedModel:
        """Return the model with the first input that running it showed.

        Raises:
            ConfigError: Preprocessed images don't fit that input.
        """
        preprocess = self.preprocess and fitted(self.preprocess, found, self.name)
        return replace(self, signature=self.signature.with_main(found), preprocess=preprocess)

    def assumptions(self) -> str:
        """Return a warning about image preprocessing that nothing says; empty if all is known."""
        if self.preprocess is None or not self.preprocess.assumed:
            return ""
        return (
            f"model {self.name}: neither the model nor the configuration says "
            f"{', '.join(self.preprocess.assumed)}, so image files are preprocessed by assumption: "
            f"{self.preprocess.describe()}. If that is not what the model was trained with, its "
            f"features of images are wrong; set these keys, or the factory's attribute 'preprocess'"
        )

    def weight_bytes(self) -> int:
        """Return the bytes of the parameters and buffers; what is shared counts once."""
        tensors = {id(t): t for t in (*self.module.parameters(), *self.module.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
