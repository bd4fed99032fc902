"""What a model has to offer, in words shared by engine and command line. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from layertap.selection import Capture, Extractor

__all__ = [
    "Dimension",
    "InputDescription",
    "LayerDescription",
    "ModelDescription",
    "PassDescription",
    "RefusedPlan",
    "ValueDescription",
]


@dataclass(frozen=True, slots=True)
class Dimension:
    """One dimension of a tensor.

    Attributes:
        size: Its size for one item; the default size of an input.
        batch: Whether it grows with the batch, by ``size`` for each item.
        free: The name of a dimension of an input that may have another size; else empty.
    """

    size: int
    batch: bool = False
    free: str = ""


@dataclass(frozen=True, slots=True)
class InputDescription:
    """One tensor that a model takes, the batch first.

    Attributes:
        name: What requests call it.
        dtype: Its element type, such as ``"float32"``.
        shape: Its dimensions.
        images: Whether encoded images are taken instead.
        preprocessing: What is done to those, in words.
        optional: Whether a request may leave it out.
    """

    name: str
    dtype: str
    shape: tuple[Dimension, ...]
    images: bool = False
    preprocessing: str = ""
    optional: bool = False

    def __str__(self) -> str:
        """Return such as ``x [B, 3, 224*, 224*] float32 or images``; the star means any size."""
        sizes = ["B" if dim.batch else f"{dim.size}{'*' * bool(dim.free)}" for dim in self.shape]
        images = " or images" if self.images else ""
        optional = " (optional)" if self.optional else ""
        return f"{self.name} [{', '.join(sizes)}] {self.dtype}{images}{optional}"


@dataclass(frozen=True, slots=True)
class ValueDescription:
    """The output or the input of a layer, for default items.

    Attributes:
        dtype: Its element type, such as ``"float32"``.
        shape: Its dimensions.
        bytes_per_item: Bytes of the elements of one item.
        dynamic: Whether the shape depends on the content of the input.
        interleaved: Whether items are interleaved along the batch dimension.
        quantized: The quantized element type that it is made of; else empty.
    """

    dtype: str
    shape: tuple[Dimension, ...]
    bytes_per_item: int
    dynamic: bool = False
    interleaved: bool = False
    quantized: str = ""

    @property
    def pattern(self) -> str:
        """The shape in words, such as ``"[B, 64, 56, 56]"``, where B is the batch."""
        if self.dynamic:
            return f"[{', '.join(str(dim.size) for dim in self.shape)}] varies"
        sizes = [
            ("B" if dim.size == 1 else f"{dim.size}B") if dim.batch else str(dim.size)
            for dim in self.shape
        ]
        return f"[{', '.join(sizes)}]"

    def __str__(self) -> str:
        """Return such as ``[B, 64, 56, 56] float32``."""
        made_of = f" of {self.quantized}" if self.quantized else ""
        return f"{self.pattern} {self.dtype}{made_of}"


@dataclass(frozen=True, slots=True)
class LayerDescription:
    """A layer of a model.

    Attributes:
        name: What to ask for.
        type: The module's class, or the operation of a graph node.
        is_node: Whether it is a node of the symbolic graph and no module.
        calls: How often it runs in one forward pass.
        values: What it returns and takes, where that is a tensor.
        refusals: For each extractor and side of the layer, why it can't be taken; empty where it
            can be.
        stride: The height of the first input over the height of the output; 0 for an output that
            is no grid.
        channels: Channels of the output, or the width of its tokens; 0 where that is not known.
        same_as: The name of the same layer by another path to its module; else empty.
        is_result: Whether it is what the model itself returns, or a member of that.
    """

    name: str
    type: str
    is_node: bool = False
    calls: int = 1
    values: Mapping[Capture, ValueDescription] = field(default_factory=dict)
    refusals: Mapping[Extractor, Mapping[Capture, str]] = field(default_factory=dict)
    stride: float = 0.0
    channels: int = 0
    same_as: str = ""
    is_result: bool = False

    @property
    def output(self) -> ValueDescription | None:
        """What it returns; None where that is no tensor."""
        return self.values.get(Capture.OUTPUT)

    def __str__(self) -> str:
        """Return such as ``layer1: Sequential [B, 64, 56, 56] float32``."""
        return f"{self.name}: {self.type} {self.output or '(no tensor)'}"

    def extractors(self, side: Capture = Capture.OUTPUT) -> tuple[Extractor, ...]:
        """Return the extractors that take one side of the layer, AUTO's favourite first."""
        return tuple(each for each, by in self.refusals.items() if not by.get(side, "-"))


@dataclass(frozen=True, slots=True)
class PassDescription:
    """How a model's forward passes are run.

    Attributes:
        early_stop: Whether a pass may stop after the last layer that was asked for.
        concurrent: Whether passes may run at the same time.
        shared: Whether requests may share a pass.
        state: What a pass leaves in the model: ``"none"``, ``"reset"`` where the loaded state is
            put back after each, or ``"kept"`` for a stateful model.
    """

    early_stop: bool
    concurrent: bool
    shared: bool
    state: str


@dataclass(frozen=True, slots=True)
class RefusedPlan:
    """A set of layers that an extractor was tried on and could not serve.

    Attributes:
        layers: Their names, with ``:input`` behind those of inputs.
        inputs: The name and the item shape of each input, for the size of items it was tried with.
        reason: Why not.
    """

    layers: tuple[str, ...]
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    reason: str


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model and its layers.

    Attributes:
        name: The model's name.
        source: Where it comes from, such as ``"torchvision:resnet18"``.
        weights: Which weights it has.
        device: What it runs on.
        inputs: What it takes.
        layers: Its layers in execution order.
        passes: How its passes are run; None where that is not known.
        notes: What is unusual about it, in words.
        refused_plans: What extractors could not serve.
    """

    name: str
    source: str
    weights: str
    device: str
    inputs: tuple[InputDescription, ...]
    layers: tuple[LayerDescription, ...]
    passes: PassDescription | None = None
    notes: tuple[str, ...] = ()
    refused_plans: tuple[RefusedPlan, ...] = ()

    def __str__(self) -> str:
        """Return a line about the model, then one for each layer that is a module."""
        taken = ", ".join(map(str, self.inputs))
        lines = [f"{self.name}: {self.source}, weights {self.weights}, takes {taken}"]
        lines += [str(layer) for layer in self.layers if not layer.is_node]
        return "\n".join(lines)
