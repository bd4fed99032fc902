"""From a PIL image to the tensor a torchvision model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.functional import (
    center_crop,
    convert_image_dtype,
    normalize,
    pil_to_tensor,
    resize,
)

from layertap.errors import InvalidInputError
from layertap.models.input_spec import InputSpec

__all__ = ["MAX_RESIZED_PIXELS", "Preprocess", "default_preprocess"]

MAX_RESIZED_PIXELS = 16 * 2**20
"""An image of 1 x 10,000 pixels whose short side becomes 256 would have 655 million of them."""


@dataclass(frozen=True, slots=True)
class Preprocess:
    """A transform as torchvision's weights give it: ``weights.transforms()``.

    Attributes:
        transform: Takes a PIL image, gives ``[C, H, W] float32``. What it does is read from its
            attributes ``resize_size``, ``crop_size``, ``mean``, ``std``, ``interpolation`` and
            ``antialias``, where it has them.
    """

    transform: Callable[[Image.Image], torch.Tensor]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the image as ``[C, H, W] float32``, on the CPU.

        Raises:
            InvalidInputError: the image is so narrow that resizing it would make a huge one.
        """
        return self._finish(self.shrink(image))

    def shrink(self, image: Image.Image) -> Image.Image:
        """Do the part of the work that is PIL's alone, which is most of it: resize and crop.

        No PyTorch runs here, so any thread may; where a transform can't be cut in two nothing is
        done yet.

        Raises:
            InvalidInputError: the image is so narrow that resizing it would make a huge one.
        """
        self._check_resized(image.width, image.height)
        steps = self._steps()
        if steps is None:
            return image
        resized = resize(image, steps.resize_size, steps.interpolation, antialias=steps.antialias)
        shrunk: Image.Image = center_crop(resized, steps.crop_size)
        return shrunk

    def batch(self, shrunk: Sequence[Image.Image]) -> torch.Tensor:
        """Return images that ``shrink`` returned as one batch ``[B, C, H, W] float32``, on the CPU.

        Raises:
            InvalidInputError: there is no image, or their sizes differ after preprocessing, as
                happens where the model's preprocessing doesn't crop.
        """
        if not shrunk:
            raise InvalidInputError("images: got none, expected at least one")
        tensors: list[torch.Tensor] = []
        for index, image in enumerate(shrunk):
            tensor = self._finish(image)
            if tensors and tensor.shape != tensors[0].shape:
                raise InvalidInputError(
                    f"images[{index}]: got {_size(tensor)} after preprocessing, expected "
                    f"{_size(tensors[0])} like images[0]: this model's preprocessing doesn't crop, "
                    "so a batch needs images of one size"
                )
            tensors.append(tensor)
        return torch.stack(tensors)

    def _finish(self, shrunk: Image.Image) -> torch.Tensor:
        steps = self._steps()
        if steps is None:
            return self.transform(shrunk)
        values = convert_image_dtype(pil_to_tensor(shrunk), torch.float32)
        normal: torch.Tensor = normalize(values, mean=steps.mean, std=steps.std)
        return normal

    def _steps(self) -> Any:
        """Return torchvision's transform for classification, whose steps are known; else None."""
        # A subclass may do anything.
        return self.transform if type(self.transform) is ImageClassification else None

    def describe(self) -> str:
        """Return the steps in words, such as ``"resize 256 (bilinear, antialias), ..."``."""
        steps = []
        if self._sizes("resize_size"):
            how = [str(getattr(self._of("interpolation"), "value", "bilinear"))]
            if self._of("antialias"):
                how.append("antialias")
            steps.append(f"resize {_by(self._sizes('resize_size'))} ({', '.join(how)})")
        if self._sizes("crop_size"):
            steps.append(f"center crop {_by(self._sizes('crop_size'))}")
        steps.append("rescale to [0, 1]")
        if self._of("mean"):
            steps.append(f"normalize mean {list(self._of('mean'))} std {list(self._of('std'))}")
        return ", ".join(steps)

    def _of(self, attribute: str) -> Any:
        return getattr(self.transform, attribute, None)

    def _sizes(self, attribute: str) -> list[int]:
        return list(self._of(attribute) or ())

    def _check_resized(self, width: int, height: int) -> None:
        sizes = self._sizes("resize_size")
        if len(sizes) != 1:
            return
        short, long = sorted((width, height))
        # Torchvision's rule: one size is the short side's, the long side keeps the proportion.
        if sizes[0] * (sizes[0] * long // short) > MAX_RESIZED_PIXELS:
            raise InvalidInputError(
                f"images: got {width} x {height} pixels, expected an image whose short side can "
                f"become {sizes[0]} pixels with at most {MAX_RESIZED_PIXELS} pixels in all"
            )


def default_preprocess(takes: InputSpec) -> Preprocess | None:
    """Return ImageNet's preprocessing for a model that takes ``[B, 3, H, W] float32``, else None.

    torchvision's evaluation transform of ResNet: the short side to 256 / 224 of the item, the
    centre cropped, ImageNet's mean and standard deviation.
    """
    if takes.dtype is not torch.float32 or len(takes.item_shape) != 3 or takes.item_shape[0] != 3:
        return None
    height, width = takes.item_shape[1:]
    resize = round(max(height, width) * 256 / 224)
    transform = ImageClassification(crop_size=height, resize_size=resize)
    transform.crop_size = [height, width]
    return Preprocess(transform)


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _size(tensor: torch.Tensor) -> str:
    return f"{tensor.shape[-1]} x {tensor.shape[-2]} pixels"
