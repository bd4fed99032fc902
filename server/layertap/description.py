"""The description of a model, shared by engine and command line. Independent of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from layertap.selection import Capture, Extractor

__all__ = [
    "Dimension",
    "ImageDescription",
    "InputDescription",
    "ItemDescription",
    "LayerDescription",
    "ModelDescription",
    "PassDescription",
    "RefusedPlanDescription",
    "ValueDescription",
]


@dataclass(frozen=True, slots=True)
class Dimension:
    """One dimension of a tensor.

    Attributes:
        size: Its size for one item. For an input, the default size.
        batch: Whether it grows with the batch, by ``size`` per item.
        free: For a dimension of an input that may have another size: its name; else empty.
        expression: How the size of a layer's dimension follows the inputs' free dimensions, such as
            ``"ceil(H/4)"``; empty if it does not depend on them.
        varies: Whether the size of a layer's dimension may be another one for items of another
            size, and no expression for it was confirmed.
    """

    size: int
    batch: bool = False
    free: str = ""
    expression: str = ""
    varies: bool = False

    def __str__(self) -> str:
        """Return such as ``B``, ``64``, ``H=224``, ``ceil(H/4)``, or ``49?`` if it varies."""
        if self.free:
            return f"{self.free}={self.size}"
        size = self.expression or f"{self.size}{'?' * self.varies}"
        if not self.batch:
            return size
        if size == "1":
            return "B"
        if not self.expression:
            return f"{size}B"
        return f"({size})*B" if _is_sum(size) else f"{size}*B"


def _is_sum(expression: str) -> bool:
    """Return whether an expression has a plus or minus outside of parentheses."""
    depth = 0
    for character in expression:
        depth += (character == "(") - (character == ")")
        if not depth and character in "+-":
            return True
    return False


@dataclass(frozen=True, slots=True)
class ImageDescription:
    """The steps that convert an encoded image to an item of an input, in this order.

    Attributes:
        color: The channels that images are decoded to: ``"rgb"`` or ``"gray"``.
        exif_orientation: Whether the EXIF orientation is applied.
        resize: The size of the short side, or height and width; empty if images aren't resized.
        resize_mode: What ``resize`` means: ``"short side"``, ``"exact"``, ``"cover"`` or
            ``"contain"``.
        interpolation: How images are resized, such as ``"bilinear"``.
        crop: Height and width of the centre crop; empty for none.
        mean: What is subtracted, one number for each channel or one for all; empty for nothing.
        std: What the difference is divided by; empty for nothing.
        origin: Where the steps come from.
        assumed: The steps that nothing specifies, so that a default is used.
        custom: The name of the model's own function, which does everything after decoding in place
            of the steps; empty for none.
    """

    color: str
    exif_orientation: bool
    resize: tuple[int, ...] = ()
    resize_mode: str = ""
    interpolation: str = ""
    crop: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    origin: str = ""
    assumed: tuple[str, ...] = ()
    custom: str = ""


@dataclass(frozen=True, slots=True)
class InputDescription:
    """One tensor that a model takes, with the batch dimension first.

    Attributes:
        name: The name that requests use.
        dtype: Its dtype, such as ``"float32"``.
        shape: Its dimensions.
        images: How encoded images are preprocessed; None if the input takes none.
        preprocessing: The same in words; empty if the input takes no images.
        optional: Whether a request may leave it out.
        texts: Whether texts are accepted instead.
        tokenization: How these texts become token ids, in words.
        sampling_rate: The samples per second that recordings must have; 0 if none are accepted.
        audio_preprocessing: How recordings are converted, in words.
    """

    name: str
    dtype: str
    shape: tuple[Dimension, ...]
    images: ImageDescription | None = None
    preprocessing: str = ""
    optional: bool = False
    texts: bool = False
    tokenization: str = ""
    sampling_rate: int = 0
    audio_preprocessing: str = ""

    def __str__(self) -> str:
        """Return such as ``x [B, 3, H=224, W=224] float32 or images``, where H, W may differ."""
        kinds = {"images": self.images, "texts": self.texts, "audio": self.sampling_rate}
        others = "".join(f" or {kind}" for kind, taken in kinds.items() if taken)
        optional = " (optional)" if self.optional else ""
        return f"{self.name} [{', '.join(map(str, self.shape))}] {self.dtype}{others}{optional}"


@dataclass(frozen=True, slots=True)
class ValueDescription:
    """The output or the input of a layer, for default items.

    Attributes:
        dtype: Its dtype, such as ``"float32"``.
        shape: Its dimensions.
        bytes_per_item: The bytes of one item.
        dynamic: Whether the shape depends on the content of the input.
        interleaved: Whether items are interleaved along the batch dimension.
        quantized: The quantised dtype of the model's own value; empty if it is not quantised.
    """

    dtype: str
    shape: tuple[Dimension, ...]
    bytes_per_item: int
    dynamic: bool = False
    interleaved: bool = False
    quantized: str = ""

    @property
    def pattern(self) -> str:
        """The shape in words, such as ``"[B, 64, ceil(H/4), ceil(W/4)]"``, where B is the batch.

        A size with a question mark is that of default items.
        """
        if self.dynamic:
            return f"[{', '.join(str(dim.size) for dim in self.shape)}] varies"
        return f"[{', '.join(map(str, self.shape))}]"

    def __str__(self) -> str:
        """Return a text such as ``[B, 64, 56, 56] float32``."""
        made_of = f" of {self.quantized}" if self.quantized else ""
        return f"{self.pattern} {self.dtype}{made_of}"


@dataclass(frozen=True, slots=True)
class LayerDescription:
    """A layer of a model.

    Attributes:
        name: The name to request.
        type: The module's class, or the operation of a graph node.
        is_node: Whether it is a node of the symbolic graph instead of a module.
        calls: How often it runs in one forward pass.
        values: Its output and input, if these are tensors.
        refusals: Why an extractor can't capture a side of the layer, by extractor and side; empty
            if it can.
        stride: The height of the first input divided by that of the output; 0 if the output is not
            a grid.
        channels: Channels of the output, or the width of its tokens; 0 if unknown.
        layout: Which dimensions of the output are the grid's: ``"channels_first"``,
            ``"channels_last"`` or ``"tokens"``; empty if the output is not a grid.
        grid: Height and width of the grid; empty if the output is not a grid.
        front_tokens: Tokens before those of the grid, such as a class token.
        same_as: The name of the same layer by another path to its module; else empty.
        is_result: Whether it is the model's own result, or a member of it.
    """

    name: str
    type: str
    is_node: bool = False
    calls: int = 1
    values: Mapping[Capture, ValueDescription] = field(default_factory=dict)
    refusals: Mapping[Extractor, Mapping[Capture, str]] = field(default_factory=dict)
    stride: float = 0.0
    channels: int = 0
    layout: str = ""
    grid: tuple[int, ...] = ()
    front_tokens: int = 0
    same_as: str = ""
    is_result: bool = False

    @property
    def output(self) -> ValueDescription | None:
        """The layer's output; None if that is not a tensor."""
        return self.values.get(Capture.OUTPUT)

    def __str__(self) -> str:
        """Return a text such as ``layer1: Sequential [B, 64, 56, 56] float32``."""
        return f"{self.name}: {self.type} {self.output or '(no tensor)'}"

    def extractors(self, side: Capture = Capture.OUTPUT) -> tuple[Extractor, ...]:
        """Return the extractors that can capture one side of the layer, in AUTO's preference."""
        return tuple(each for each, by in self.refusals.items() if not by.get(side, "-"))


@dataclass(frozen=True, slots=True)
class PassDescription:
    """How a model's forward passes run.

    Attributes:
        early_stop: Whether a pass may stop after the last requested layer.
        concurrent: Whether passes may run at the same time.
        shared: Whether requests may share a pass.
        state: What happens to state that passes write: ``"none"`` if they write none, ``"reset"``
            if the loaded state is restored after each pass, ``"kept"`` for a stateful model.
    """

    early_stop: bool
    concurrent: bool
    shared: bool
    state: str


@dataclass(frozen=True, slots=True)
class ItemDescription:
    """One item of a batch, for one input.

    Attributes:
        name: The input's name.
        dtype: The element type, such as ``"float32"``.
        shape: The sizes, without the batch.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        """Return a text such as ``x [B, 3, 224, 224]``."""
        return f"{self.name} [{', '.join(['B', *map(str, self.shape)])}]"


@dataclass(frozen=True, slots=True)
class RefusedPlanDescription:
    """A set of layers that an extractor was tested with and could not serve.

    Attributes:
        extractor: The extractor.
        layers: The names of the layers, with the suffix ``:input`` for inputs.
        inputs: The items that were tested.
        reason: Why it could not serve them.
    """

    extractor: Extractor
    layers: tuple[str, ...]
    inputs: tuple[ItemDescription, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model and its layers.

    Attributes:
        name: The model's name.
        source: Where it comes from, such as ``"torchvision:resnet18"``.
        weights: Which weights it has.
        device: The device that it runs on.
        inputs: Its inputs.
        layers: Its layers in execution order.
        passes: How its passes run; None if unknown.
        notes: What is unusual about it, in words.
        declared_layers: The layers that were declared, which are compiled and warm.
        refused_plans: The layer sets that extractors could not serve.
        variants: The ways to finish an extractor's program besides the usual one, such as
            ``channels_last``, by extractor.
        fingerprint: A digest of its modules and weights, the kind of its device, and the versions
            of PyTorch and torchvision; empty if it was not asked for.
    """

    name: str
    source: str
    weights: str
    device: str
    inputs: tuple[InputDescription, ...]
    layers: tuple[LayerDescription, ...]
    passes: PassDescription | None = None
    notes: tuple[str, ...] = ()
    declared_layers: tuple[str, ...] = ()
    refused_plans: tuple[RefusedPlanDescription, ...] = ()
    variants: Mapping[Extractor, tuple[str, ...]] = field(default_factory=dict)
    fingerprint: str = ""

    def __str__(self) -> str:
        """Return one line about the model, then one line per layer that is a module."""
        taken = ", ".join(map(str, self.inputs))
        lines = [f"{self.name}: {self.source}, weights {self.weights}, takes {taken}"]
        lines += [str(layer) for layer in self.layers if not layer.is_node]
        return "\n".join(lines)
