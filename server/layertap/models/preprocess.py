"""Converts an encoded image to a model's input tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from layertap.errors import ConfigError, InvalidInputError, ModelLoadError
from layertap.models.exact_images import FILTERS, Pixels, convert, image_of, is_exact
from layertap.models.images import (
    DEFAULT_LIMITS,
    ImageLimits,
    Reading,
    decode_image,
    decode_pixels,
)
from layertap.models.signature import InputSpec
from layertap.models.steps import CustomTransform, ResizeMode, Steps, steps_of
from layertap.settings import Color, ImageSettings

__all__ = ["Preprocess", "choose_preprocess", "fitted"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How to convert an image file to an input item of a model.

    Attributes:
        steps: The steps that are applied to the decoded image.
        channels: Channels of the item; if several, a gray image is repeated for each.
        color: The channels that a file is decoded to.
        exif_orientation: Whether the picture is turned as its EXIF orientation says.
        origin: Where the steps come from, such as ``"timm's configuration"``; shown to clients.
        assumed: The steps that were assumed because nothing states them, by their names in
            ``[[models]]`` (``"image_mean"``); empty if all are known.
    """

    steps: Steps | CustomTransform
    channels: int = 3
    color: Color = Color.RGB
    exif_orientation: bool = True
    origin: str = ""
    assumed: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, transform: Callable[[Image.Image], Any], origin: str = "") -> Preprocess:
        """Return the preprocessing for a function that converts a PIL image to ``[C, H, W]``."""
        return cls(steps_of(transform), origin=origin)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The ``(C, H, W)`` of every converted image; None if that depends on the image."""
        if not isinstance(self.steps, Steps):
            return None
        exact = self.steps.resize if self.steps.resize_mode is ResizeMode.EXACT else ()
        size = self.steps.crop or exact
        return (self.channels, *size) if size else None

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Convert a decoded image to ``[C, H, W] float32``, on the CPU: the reference for values.

        Raises:
            InvalidInputError: The image is so narrow that resizing would make it huge.
        """
        return self.steps.finish(self.steps.shrink(image), self.channels)

    @property
    def is_fast(self) -> bool:
        """Whether files are converted without PyTorch, by ``exact_images``."""
        if not isinstance(self.steps, Steps):
            return False
        return (not self.steps.resize or self.steps.interpolation in FILTERS) and is_exact()

    def decode(
        self,
        data: bytes,
        index: int,
        limits: ImageLimits = DEFAULT_LIMITS,
        target: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32] | Image.Image:
        """Decode an image file, resize and crop it, and convert it if that needs no PyTorch.

        This is all of the work or most of it. Any thread may call it.

        Args:
            data: The encoded file.
            index: The image's place in the request, for messages.
            limits: The limits for decoding.
            target: Where to write the item, ``[C, H, W]``, if the preprocessing gives one shape.

        Returns:
            The item ``[C, H, W] float32``, which is ``target`` if given; or the resized image, for
            ``steps.finish``, in the cases that ``exact_images`` doesn't handle: 16 bits, images
            that need padding, a function as preprocessing.

        Raises:
            InvalidInputError: The file can't be decoded, or the image is so narrow that resizing
                would make it huge.
        """
        steps = self.steps
        if not isinstance(steps, Steps) or not self.is_fast:
            return steps.shrink(decode_image(data, index, limits, self._reading), index)
        decoded = decode_pixels(data, index, limits, self._reading)
        if isinstance(decoded, Image.Image):
            return steps.shrink(decoded, index)
        item = self._converted(steps, decoded, index, target)
        return steps.shrink(image_of(decoded, self.color), index) if item is None else item

    @property
    def _reading(self) -> Reading:
        return Reading(self.color, self.exif_orientation, keep_16_bit=isinstance(self.steps, Steps))

    def _converted(
        self, steps: Steps, pixels: Pixels, index: int, target: NDArray[np.float32] | None
    ) -> NDArray[np.float32] | None:
        """Return the item; None if the image needs padding or has other channels."""
        height, width, channels = pixels.shape
        kept = steps.kept(width, height, index)
        if kept is None or (channels > 1 and self.channels != 3):
            return None
        if target is None:
            target = np.empty((self.channels, *kept.window[2:]), np.float32)
        tables = steps.tables(self.channels)
        convert(pixels, kept, steps.interpolation, tables, target)
        return target

    def pictures(self, batch: torch.Tensor) -> torch.Tensor | None:
        """Return the pixels of a batch ``[B, C, H, W]`` that the model takes, as RGB.

        Returns:
            ``[B, H, W, 3] uint8``; None if the steps are a function, so that its normalisation is
            not known, or the batch is not of one or three channels.
        """
        if not isinstance(self.steps, Steps) or batch.dim() != 4 or batch.shape[1] not in (1, 3):
            return None
        return self.steps.pictures(batch)

    def describe(self) -> str:
        """Return the steps in words, and where they come from."""
        turn = "" if self.exif_orientation else " not"
        color = "RGB (alpha dropped)" if self.color is Color.RGB else "gray (alpha dropped)"
        words = [f"EXIF orientation{turn} applied", color, *self.steps.describe()]
        notes = [self.origin] if self.origin else []
        if self.assumed:
            notes.append(f"defaults, as nothing specifies them: {', '.join(self.assumed)}")
        return ", ".join(words) + (f"; {'; '.join(notes)}" if notes else "")


def choose_preprocess(
    known: Preprocess | None, settings: ImageSettings, takes: InputSpec, model: str
) -> Preprocess | None:
    """Return a model's preprocessing: what the user set, else what is known, else assumptions.

    Steps that nothing states are assumed as torchvision evaluates ResNet, and listed in
    ``assumed``: the short side resized to 256/224 of the item's size, a centre crop, and
    ImageNet's mean and standard deviation for three channels, none for one.

    Args:
        known: The preprocessing in the model's own configuration; None if there is none.
        settings: The user's settings.
        takes: The model's input.
        model: The model's name, for messages.

    Returns:
        None if the model's input is not an image of one or three channels, and nothing is set.

    Raises:
        ConfigError: The settings don't fit the model's input or its own preprocessing.
    """
    if known is not None and isinstance(known.steps, CustomTransform):
        return _with_custom(known, known.steps, settings, takes, model)
    if not _is_image(takes):
        if known is None and settings.given:
            raise ConfigError(
                f"{settings.given[0]} of {model}: its input is {takes.pattern} {takes.dtype_name}, "
                f"which is not an image of one or three channels"
            )
        return known
    return _with_steps(known, settings, takes, model)


def _is_image(takes: InputSpec) -> bool:
    return takes.dtype.is_floating_point and len(takes.shape) == 3 and takes.shape[0] in (1, 3)


def _with_steps(
    known: Preprocess | None, settings: ImageSettings, takes: InputSpec, model: str
) -> Preprocess:
    channels, *size = takes.shape
    base = known.steps if known is not None else _assumed_steps(channels, tuple(size), settings)
    if not isinstance(base, Steps):
        raise TypeError("a custom transform has no steps to replace")
    color = Color(settings.color) if settings.color else _color(channels)
    chosen = Preprocess(
        _merged(base, settings),
        channels,
        color,
        exif_orientation=settings.exif_orientation is not False,
        origin=_origin(known, settings),
        assumed=_still_assumed(known, settings),
    )
    _check_channels(chosen, model)
    _check_size(chosen, takes, model)
    is_exact()  # compares now, not when the first request waits
    return chosen


def fitted(preprocess: Preprocess, takes: InputSpec, model: str) -> Preprocess | None:
    """Return a preprocessing if it fits an input that was found by running the model.

    Returns:
        None if it was only assumed and the input turned out not to be an image.

    Raises:
        ConfigError: It was set or known, and doesn't fit the input.
    """
    if isinstance(preprocess.steps, Steps) and not _is_image(takes):
        if not preprocess.origin:
            return None
        raise ConfigError(
            f"images of {model}: their preprocessing is known ({preprocess.origin}), but the model "
            f"takes {takes.pattern} {takes.dtype_name}, which is not an image of one or three "
            f"channels"
        )
    _check_size(preprocess, takes, model)
    return preprocess


def _color(channels: int) -> Color:
    return Color.GRAY if channels == 1 else Color.RGB


def _assumed_steps(channels: int, size: tuple[int, ...], settings: ImageSettings) -> Steps:
    crop = settings.crop if settings.crop is not None else size
    if settings.resize is not None and len(settings.resize) == 2 and settings.crop is None:
        crop = ()  # The resize already fixes both sizes.
    short = round(max(crop or size) * 256 / 224)
    return Steps(
        resize=(short,),
        crop=_pair(crop),
        mean=IMAGENET_MEAN if channels == 3 else (),
        std=IMAGENET_STD if channels == 3 else (),
    )


def _merged(base: Steps, settings: ImageSettings) -> Steps:
    """Return the steps, with those that the user set replaced."""
    changes: dict[str, Any] = {}
    if settings.mean is not None:
        changes["mean"] = settings.mean
    if settings.std is not None:
        changes["std"] = settings.std
    if settings.interpolation is not None:
        changes["interpolation"] = settings.interpolation
    if settings.crop is not None:
        changes["crop"] = _pair(settings.crop)
    if settings.resize is not None:
        exact = len(settings.resize) == 2
        changes["resize"] = settings.resize
        changes["resize_mode"] = ResizeMode.EXACT if exact else ResizeMode.SHORT_SIDE
        changes["fill"] = ()
        if exact and settings.crop is None:
            changes["crop"] = ()  # The resize already fixes both sizes.
    return replace(base, **changes)


def _still_assumed(known: Preprocess | None, settings: ImageSettings) -> tuple[str, ...]:
    """Return the steps that neither the model's configuration nor the settings state."""
    names = ("mean", "std", "resize", "crop", "interpolation")
    assumed = known.assumed if known is not None else [f"image_{name}" for name in names]
    said = set(settings.given)
    if settings.resize is not None and len(settings.resize) == 2:
        said.add("image_crop")  # The resize already fixes both sizes.
    if settings.resize == ():
        said.add("image_interpolation")
    return tuple(name for name in assumed if name not in said)


def _origin(known: Preprocess | None, settings: ImageSettings) -> str:
    parts = [known.origin] if known is not None and known.origin else []
    if settings.given:
        parts.append(f"set in the server's configuration: {', '.join(settings.given)}")
    return "; ".join(parts)


def _check_channels(chosen: Preprocess, model: str) -> None:
    if chosen.color is Color.RGB and chosen.channels == 1:
        raise ConfigError(
            f"image_color of {model}: got 'rgb', but the model takes one channel; expected 'gray'"
        )
    steps = chosen.steps
    for name in ("mean", "std"):
        values = getattr(steps, name)
        if len(values) not in (0, 1, chosen.channels):
            raise ConfigError(
                f"image_{name} of {model}: got {list(values)}, expected one number or one for each "
                f"of the model's {chosen.channels} channels"
            )


def _check_size(chosen: Preprocess, takes: InputSpec, model: str) -> None:
    made = chosen.shape
    if made is None:
        return
    try:
        takes.check((1, *made), takes.dtype_name)
    except InvalidInputError as error:
        cropped = isinstance(chosen.steps, Steps) and chosen.steps.crop
        name = "image_crop" if cropped else "image_resize"
        raise ConfigError(
            f"{name} of {model}: got {_by(made[1:])} (height x width), but the model takes "
            f"{takes.pattern}, such as {list(takes.batch_shape(1))}; set another item shape, "
            f"or another size here"
        ) from error


def _with_custom(
    known: Preprocess,
    custom: CustomTransform,
    settings: ImageSettings,
    takes: InputSpec,
    model: str,
) -> Preprocess:
    """Return a custom preprocessing after a test run, with the settings for reading the file.

    Raises:
        ConfigError: Other steps are set, which can't be replaced inside the function.
        ModelLoadError: It raises, or its result does not fit the model's input.
    """
    fixed = [name for name in settings.given if name not in ("exif_orientation", "image_color")]
    if fixed:
        raise ConfigError(
            f"{fixed[0]} of {model}: its preprocessing is a function of its own ({custom.name}), "
            f"whose steps can't be replaced one by one; leave {', '.join(fixed)} out, or change "
            f"the function"
        )
    color = Color(settings.color) if settings.color else known.color
    chosen = replace(
        known,
        channels=takes.shape[0] if takes.shape else 1,
        color=color,
        exif_orientation=settings.exif_orientation is not False,
        origin=_origin(known, settings),
    )
    probe = Image.effect_noise((320, 240), 64).convert("RGB" if color is Color.RGB else "L")
    shape = takes.pattern.replace("B, ", "")
    wanted = f"a function that turns a PIL image into a tensor {shape}"
    try:
        made = chosen(probe)
    # The function is the user's own code, which may raise anything.
    except Exception as error:
        raise ModelLoadError(
            f"preprocess of {model} ({custom.name}): it raised {type(error).__name__}: {error}; "
            f"expected {wanted}"
        ) from error
    try:
        takes.check((1, *made.shape), takes.dtype_name)
    except InvalidInputError as error:
        raise ModelLoadError(
            f"preprocess of {model} ({custom.name}): it returned a tensor of shape "
            f"{list(made.shape)}, expected {wanted}"
        ) from error
    return chosen


def _pair(sizes: Sequence[int]) -> tuple[int, ...]:
    return (sizes[0], sizes[-1]) if sizes else ()


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
