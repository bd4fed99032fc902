"""A loaded model: a module in eval mode on its device, and its inputs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn

from layertap.models.arguments import Adapter, Arguments
from layertap.models.audio import AudioProcessor
from layertap.models.batch import Batch
from layertap.models.preprocess import Preprocess, fitted
from layertap.models.signature import InputSpec, Signature, Tower
from layertap.models.text import TextTokenizer

__all__ = ["Built", "Example", "LoadedModel", "Twin"]

Example = Callable[[int], Mapping[str, torch.Tensor]]
"""Makes the inputs of a batch with a number of items, by name."""


@dataclass(frozen=True, slots=True)
class Built:
    """What a source passes to ``load_model``: the module on the CPU, and facts about it.

    The fields are those of `LoadedModel`, and:

    Attributes:
        inputs: What the module takes, the first one required. One that is called `DEFAULT_NAME`
            gets the name of the first parameter of the module's ``forward``.
        adapter: Makes the arguments of ``forward``; None to pass the inputs as they are.
        preprocess_is_code: Whether the preprocessing stands in the model's own code, and so wins
            over a configuration alongside its weights.
        text_inputs: The inputs that accept texts, if there is a tokenizer.
        towers: See ``Signature.towers``.
        audio_inputs: The inputs that accept recordings, if ``audio`` is not None.
        in_precision: Whether the module has the spec's precision already.
        more: Whether ``forward`` may take further inputs, which must be found by trying.
    """

    module: nn.Module
    source: str
    weights: str
    inputs: tuple[InputSpec, ...]
    preprocess: Preprocess | None = None
    image_inputs: tuple[str, ...] = ()
    takes_list: bool = False
    example: Example | None = None
    adapter: Adapter | None = None
    preprocess_is_code: bool = False
    text_inputs: tuple[str, ...] = ()
    tokenizer: TextTokenizer | None = None
    towers: tuple[Tower, ...] = ()
    audio: AudioProcessor | None = None
    audio_inputs: tuple[str, ...] = ()
    in_precision: bool = False
    more: bool = False


class Twin(Protocol):
    """A copy of a model that runs samples first; see ``extraction.cpu_twin``."""

    def refusal(self, model: LoadedModel, batch: Batch, identity: Hashable) -> str:
        """Return the error with which the copy fails on a batch; empty if it runs to its end."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        name: The name that requests use.
        source: Where it comes from, such as ``"torchvision:resnet18"``. Clients see it, so it never
            contains a directory.
        weights: Which weights it has, such as ``"ResNet18_Weights.IMAGENET1K_V1"``,
            ``"random (seed 0)"`` or a file's base name. Clients see it.
        module: The module on ``device``, in evaluation mode and without gradients.
        device: Where the module is and its input must be.
        signature: The tensors it takes.
        preprocess: Makes an item of an input of an image; None if the model takes no images.
        image_inputs: The inputs that images may be sent for.
        tokenizer: Makes token ids of texts; None if the model takes no texts.
        text_inputs: The inputs that accept texts; empty without a tokenizer. The first one is used
            if a request names none.
        audio: Converts recordings; None if the model takes none.
        audio_inputs: The inputs that accept recordings.
        takes_list: Whether the module takes a list of ``[C, H, W]`` instead of a batch, as
            torchvision's detection models do.
        differentiates: Whether the module differentiates inside its forward, which inference mode
            forbids: its passes run under ``torch.no_grad`` instead.
        arguments: Makes the arguments of the module's ``forward`` of a batch.
        example: Makes example batches; None where random ones of the inputs' types will do.
        twin: Tells on which samples the model would fail; None for a model on the CPU.
    """

    name: str
    source: str
    weights: str
    module: nn.Module
    device: torch.device
    signature: Signature
    preprocess: Preprocess | None = None
    image_inputs: tuple[str, ...] = ()
    takes_list: bool = False
    differentiates: bool = False
    tokenizer: TextTokenizer | None = None
    text_inputs: tuple[str, ...] = ()
    audio: AudioProcessor | None = None
    audio_inputs: tuple[str, ...] = ()
    arguments: Arguments = field(default_factory=Arguments)
    example: Example | None = None
    twin: Twin | None = None

    def forward(self, batch: Batch) -> Any:
        """Call the module on a batch that is on ``device``, and return its result.

        The caller sets the gradient mode, except for a module that differentiates. The module's
        exceptions are passed on. Context variables that the module sets are dropped after the call,
        because a pass that ends early would leave them set for the next pass.
        """
        if batch.refusal:
            raise RuntimeError(batch.refusal)
        return copy_context().run(self._call, batch)

    def _call(self, batch: Batch) -> Any:
        if not self.differentiates:
            return self._run(batch)
        with torch.inference_mode(False), torch.no_grad():
            # A tensor that was made in inference mode can't require a gradient; its copy can.
            plain = batch.map(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)
            return self._run(plain)

    def _run(self, batch: Batch) -> Any:
        """Run the whole module, or only the tower to which all tensors of the batch belong."""
        tower = self.signature.tower_of(batch)
        if tower is None:
            return self.call(self.module, batch)
        return getattr(self.module, tower.method)(**batch)

    def call(self, function: Callable[..., Any], batch: Batch) -> Any:
        """Call a function that takes the arguments of the module's ``forward``."""
        if self.takes_list:
            return function(list(batch.only.unbind(0)))
        args, kwargs = self.arguments.of(batch)
        return function(*args, **kwargs)

    def with_signature(self, found: Signature) -> LoadedModel:
        """Return the model with the inputs that were found by running it.

        Raises:
            ConfigError: Preprocessed images don't fit their inputs.
        """
        preprocess = self.preprocess
        images = tuple(spec.name for spec in found.inputs if spec.name in self.image_inputs)
        for name in images:
            preprocess = preprocess and fitted(preprocess, found.spec(name).image, self.name)
        return replace(self, signature=found, preprocess=preprocess, image_inputs=images)

    def assumptions(self) -> str:
        """Return a warning about assumed image preprocessing; empty if nothing was assumed."""
        if self.preprocess is None or not self.preprocess.assumed:
            return ""
        return (
            f"model {self.name}: neither the model nor the configuration says "
            f"{', '.join(self.preprocess.assumed)}, so image files are preprocessed by assumption: "
            f"{self.preprocess.describe()}. If that is not what the model was trained with, its "
            f"features of images are wrong; set these keys, or the factory's attribute 'preprocess'"
        )

    def weight_bytes(self) -> int:
        """Return the bytes of all parameters and buffers; shared tensors count once."""
        tensors = {id(t): t for t in (*self.module.parameters(), *self.module.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
