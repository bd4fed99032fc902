"""The steps from a decoded image to a model's input tensor, using torchvision's functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
    ToTensor,
)
from torchvision.transforms._presets import (
    ImageClassification,
    ObjectDetection,
    SemanticSegmentation,
)
from torchvision.transforms.functional import (
    center_crop,
    convert_image_dtype,
    normalize,
    pad,
    pil_to_tensor,
    resize,
)

from layertap.errors import InvalidInputError
from layertap.models.exact_images import Kept

__all__ = ["MAX_RESIZED_PIXELS", "CustomTransform", "ResizeMode", "Steps", "steps_of"]

MAX_RESIZED_PIXELS = 16 * 2**20
"""Limit on a resized image: 1 x 10,000 pixels with the short side made 256 would be 655 million."""


_BLACK = (0, 0, 0)


class ResizeMode(StrEnum):
    """How to read the sizes of a resize.

    SHORT_SIDE has one size, the others a height and a width. COVER keeps the proportions and makes
    the image at least as large as both sizes, CONTAIN at most as large; EXACT ignores proportions.
    """

    SHORT_SIDE = "short side"
    EXACT = "exact"
    COVER = "cover"
    CONTAIN = "contain"


@dataclass(frozen=True, slots=True)
class Steps:
    """Resize, crop the centre, scale to [0, 1], normalise.

    The same functions run in the same order as in torchvision's ``ImageClassification`` and timm's
    evaluation transform, so the values are equal bit for bit.

    Attributes:
        resize: One size for the short side, or a height and a width; empty for no resizing.
        resize_mode: How to read the sizes.
        interpolation: The filter, a value of torchvision's ``InterpolationMode``.
        crop: Height and width, or empty for no cropping. A smaller image is padded.
        fill: The value (0 to 255) of padded pixels, one per channel; black if empty.
        mean: The mean to subtract, one number per channel or one for all; empty for none.
        std: The standard deviation to divide by, in the same form.
        crop_down: Whether the edge of a crop that would lie between two pixels is moved to the left
            and up, as Hugging Face's image processors do, or to the even one, as torchvision does.
    """

    resize: tuple[int, ...] = ()
    resize_mode: ResizeMode = ResizeMode.SHORT_SIDE
    interpolation: str = "bilinear"
    crop: tuple[int, ...] = ()
    fill: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    crop_down: bool = False

    def shrink(self, image: Image.Image, index: int | None = None) -> Image.Image:
        """Resize and crop. This doesn't use PyTorch, so any thread may call it.

        Args:
            image: The decoded image.
            index: The image's place in the request, for errors; None for an image of our own.

        Raises:
            InvalidInputError: The image is so narrow that resizing would make it huge.
        """
        if self.resize:
            size = self._resized(image.width, image.height, index)
            image = resize(image, list(size), InterpolationMode(self.interpolation))
        if self.crop:
            if self.fill or self.crop_down:
                image = _padded(image, self.crop, self.fill or _BLACK)
            if self.crop_down:
                return _cropped_down(image, self.crop)
            image = center_crop(image, list(self.crop))
        return image

    def kept(self, width: int, height: int, index: int | None = None) -> Kept | None:
        """Return what ``shrink`` would keep of an image of this size.

        Returns:
            None if ``shrink`` would pad it.

        Raises:
            InvalidInputError: The image is so narrow that resizing would make it huge.
        """
        size = (height, width)
        if self.resize:
            resized = self._resized(width, height, index)
            size = _both_sides(resized, width, height)
        rows, columns = self.crop or size
        if min(size) < 1 or rows > size[0] or columns > size[1]:
            return None
        if self.crop_down:
            top, left = (size[0] - rows) // 2, (size[1] - columns) // 2
        else:
            # torchvision's center_crop: a half is rounded to the even pixel.
            top, left = round((size[0] - rows) / 2), round((size[1] - columns) / 2)
        return Kept(size, (top, left, rows, columns))

    def tables(self, channels: int) -> NDArray[np.float32]:
        """Return what ``finish`` makes of each of the 256 bytes: ``[channels, 256]``."""
        return _tables(self.mean, self.std, channels)

    def finish(self, shrunk: Image.Image, channels: int) -> torch.Tensor:
        """Convert the resized image to ``[channels, H, W] float32``, on the CPU.

        If the model has several channels, a gray image is repeated for each of them.
        """
        # 16-bit pixels are divided by 65535, 8-bit pixels by 255.
        values: torch.Tensor = convert_image_dtype(pil_to_tensor(shrunk), torch.float32)
        if values.shape[0] == 1 and channels > 1:
            values = values.repeat(channels, 1, 1)
        if not self.mean and not self.std:
            return values
        mean, std = self.mean or (0.0,), self.std or (1.0,)
        normal: torch.Tensor = normalize(values, mean=list(mean), std=list(std))
        return normal

    def pictures(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the pixels of items that ``finish`` made: ``[B, H, W, 3] uint8``.

        Args:
            batch: ``[B, C, H, W]`` with one or three channels.
        """
        mean, std = (
            torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1)
            for numbers in (self.mean or (0.0,), self.std or (1.0,))
        )
        values = (batch.to(torch.float32) * std + mean).nan_to_num().clamp(0, 1) * 255
        return values.expand(-1, 3, -1, -1).movedim(1, -1).round().to(torch.uint8).contiguous()

    def describe(self) -> list[str]:
        """Return the steps as text, such as ``["resize 256 (bilinear)", ...]``."""
        words = []
        if self.resize:
            # Pillow smooths when it makes an image smaller, with every filter except "nearest".
            how = [self.interpolation, *(["antialias"] if self.interpolation != "nearest" else [])]
            if self.resize_mode in (ResizeMode.COVER, ResizeMode.CONTAIN):
                how.insert(0, f"{self.resize_mode}, proportions kept")
            words.append(f"resize {_by(self.resize)} ({', '.join(how)})")
        if self.crop:
            size = self.crop[:1] if len(set(self.crop)) == 1 else self.crop
            fill = f" (padded with {list(self.fill)})" if self.fill else ""
            edge = ", edges rounded down" if self.crop_down else ""
            words.append(f"center crop {_by(size)}{edge}{fill}")
        words.append("rescale to [0, 1]")
        if self.mean or self.std:
            words.append(
                f"normalize mean {list(self.mean or (0.0,))} std {list(self.std or (1.0,))}"
            )
        return words

    def _resized(self, width: int, height: int, index: int | None) -> tuple[int, ...]:
        """Return the sizes to resize to: one size for the short side, or height and width."""
        size: tuple[int, ...] = self.resize
        result = size
        if self.resize_mode in (ResizeMode.COVER, ResizeMode.CONTAIN):
            # The same formula as timm's ResizeKeepRatio.
            ratios = height / size[0], width / size[1]
            ratio = max(ratios) if self.resize_mode is ResizeMode.CONTAIN else min(ratios)
            size = result = (round(height / ratio), round(width / ratio))
        elif len(size) == 1:
            # torchvision's rule: the long side keeps the proportions.
            short, long = sorted((width, height))
            result = (size[0], size[0] * long // short)
        elif self.resize_mode is ResizeMode.EXACT:
            return size  # The operator chose this size, whatever the image's.
        if math.prod(result) > MAX_RESIZED_PIXELS:
            raise InvalidInputError(
                f"got {width} x {height} pixels, expected an image whose short side can become "
                f"{min(result)} pixels with at most {MAX_RESIZED_PIXELS} pixels in all",
                image=index,
            )
        return size


@dataclass(frozen=True, slots=True)
class CustomTransform:
    """A factory's own preprocessing function, whose steps are not known.

    Attributes:
        transform: Takes a PIL image and returns a tensor or array ``[C, H, W]``, or a mapping whose
            ``pixel_values`` is a batch of one.
        name: The name that clients read.
    """

    transform: Callable[[Image.Image], Any]
    name: str

    def shrink(self, image: Image.Image, index: int | None = None) -> Image.Image:
        """Return the image unchanged: the function may only run on a compute thread."""
        return image

    def finish(self, shrunk: Image.Image, channels: int) -> torch.Tensor:
        """Return the function's result for the image, as float32 on the CPU."""
        made = self.transform(shrunk)
        if isinstance(made, Mapping) and "pixel_values" in made:
            # A Hugging Face image processor returns a batch of one, as arrays or tensors.
            made = made["pixel_values"][0]
        return torch.as_tensor(made).to("cpu", torch.float32)

    def describe(self) -> list[str]:
        """Return the name of the function, or the names of the transforms in a chain."""
        return [self.name]


@lru_cache(maxsize=256)
def _tables(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> NDArray[np.float32]:
    every_byte = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(1, 256))
    tables: NDArray[np.float32] = (
        Steps(mean=mean, std=std).finish(every_byte, channels).reshape(channels, 256).numpy()
    )
    return np.ascontiguousarray(tables)


def _both_sides(resized: tuple[int, ...], width: int, height: int) -> tuple[int, int]:
    """Return height and width of a resized image, by torchvision's rule for the short side."""
    if len(resized) == 2:
        return resized[0], resized[1]
    short, long = sorted((width, height))
    longer = int(resized[0] * long / short)
    return (longer, resized[0]) if width <= height else (resized[0], longer)


def steps_of(transform: Callable[..., Any]) -> Steps | CustomTransform:
    """Return the steps of torchvision's presets and of common chains; else the function itself."""
    # Compare the exact class, as a subclass may do anything.
    kind = type(transform)
    if kind is ImageClassification:
        return _preset(transform, crop=True)
    if kind is SemanticSegmentation:
        return _preset(transform, crop=False)
    if kind is ObjectDetection:
        return Steps()
    return (_chain(transform) if kind is Compose else None) or CustomTransform(
        transform, _name(transform)
    )


def _preset(preset: Any, *, crop: bool) -> Steps:
    return Steps(
        resize=tuple(preset.resize_size or ()),
        interpolation=str(preset.interpolation.value),
        crop=_pair(preset.crop_size) if crop else (),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        resize_mode=_mode_of(tuple(preset.resize_size or ())),
    )


def _mode_of(sizes: Sequence[int]) -> ResizeMode:
    return ResizeMode.EXACT if len(sizes) == 2 else ResizeMode.SHORT_SIDE


def _chain(compose: Any) -> Steps | None:
    """Return the steps of [Resize][CenterCrop] ToTensor [Normalize]; None for any other chain."""
    rest = list(compose.transforms)
    resizing = _take(rest, Resize)
    cropping = _take(rest, CenterCrop)
    scaling = _take(rest, ToTensor)
    normal = _take(rest, Normalize)
    if rest or scaling is None or (resizing is not None and resizing.max_size is not None):
        return None
    sizes: tuple[int, ...] = ()
    if resizing is not None:
        sizes = tuple(resizing.size) if isinstance(resizing.size, Sequence) else (resizing.size,)
    return Steps(
        resize=sizes,
        resize_mode=_mode_of(sizes),
        interpolation=str(resizing.interpolation.value) if resizing is not None else "bilinear",
        crop=_pair(cropping.size) if cropping is not None else (),
        mean=_numbers(normal.mean) if normal is not None else (),
        std=_numbers(normal.std) if normal is not None else (),
    )


def _take(rest: list[Any], kind: type) -> Any | None:
    return rest.pop(0) if rest and type(rest[0]) is kind else None


def _numbers(values: Any) -> tuple[float, ...]:
    if isinstance(values, torch.Tensor):
        # The shortest decimal of each float32, such as 0.485: the same number, but readable.
        return tuple(float(str(value)) for value in values.float().reshape(-1).numpy())
    return tuple(map(float, values))


def _pair(size: Any) -> tuple[int, int]:
    sizes = list(size) if isinstance(size, Sequence) else [size]
    return int(sizes[0]), int(sizes[-1])


def _padded(image: Image.Image, crop: tuple[int, ...], fill: tuple[int, ...]) -> Image.Image:
    """Pad the image with a colour to at least the crop's size, as timm's CenterCropOrPad does."""
    height, width = crop
    across, down = max(0, width - image.width), max(0, height - image.height)
    if not across and not down:
        return image
    color: Any = fill if image.mode == "RGB" else round(sum(fill) / len(fill))
    if image.mode == "I;16":
        color *= 257
    edges = [across // 2, down // 2, (across + 1) // 2, (down + 1) // 2]
    padded: Image.Image = pad(image, edges, fill=color)
    return padded


def _cropped_down(image: Image.Image, crop: tuple[int, ...]) -> Image.Image:
    """Return the centre of an image that is at least as large as the crop."""
    height, width = crop
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _name(transform: Any) -> str:
    if isinstance(transform, Compose):
        return ", ".join(_name(each) for each in transform.transforms)
    name = getattr(transform, "__qualname__", None)
    if name is not None:
        return f"{transform.__module__}.{name}"
    words = repr(transform)
    # Python's default repr shows only an address.
    return type(transform).__name__ if " at 0x" in words else " ".join(words.split())


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
