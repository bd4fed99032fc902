"""Collects the images of a request to a batch of a model's input."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from layertap.errors import InvalidInputError
from layertap.models.images import DEFAULT_LIMITS, ImageLimits
from layertap.models.preprocess import Preprocess

__all__ = ["ImageBatch"]


class ImageBatch:
    """The images of a request, on their way to a batch.

    If the preprocessing gives every image the same shape, the batch is allocated at once, and each
    image is converted into its place.

    Args:
        preprocess: The model's preprocessing.
        count: The number of images.

    Raises:
        InvalidInputError: There are none.
    """

    def __init__(self, preprocess: Preprocess, count: int) -> None:
        if not count:
            raise InvalidInputError("images: got none, expected at least one")
        self._preprocess = preprocess
        self._items: list[NDArray[np.float32] | Image.Image | None] = [None] * count
        self._batch: NDArray[np.float32] | None = None
        if preprocess.shape is not None and preprocess.is_fast:
            self._batch = np.empty((count, *preprocess.shape), np.float32)

    def decode(self, index: int, data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> int:
        """Decode one image. Several threads may call it at once, for different images.

        Returns:
            The number of pixels (width times height) that are kept of it.

        Raises:
            InvalidInputError: As ``Preprocess.decode``.
        """
        place = None if self._batch is None else self._batch[index]
        item = self._preprocess.decode(data, index, limits, place)
        self._items[index] = item
        if isinstance(item, Image.Image):
            return item.width * item.height
        return math.prod(item.shape[1:])

    @property
    def needs_torch(self) -> bool:
        """Whether ``tensor`` computes with PyTorch, so that only a compute thread may call it."""
        return self._batch is None or any(isinstance(item, Image.Image) for item in self._items)

    def tensor(self) -> torch.Tensor:
        """Return the batch, ``[B, C, H, W] float32`` on the CPU, once all images are decoded.

        Raises:
            InvalidInputError: The sizes differ after preprocessing, which can happen if the model's
                preprocessing doesn't crop.
        """
        if not self.needs_torch:
            return torch.from_numpy(self._batch)
        tensors: list[torch.Tensor] = []
        for index, item in enumerate(self._items):
            tensor = self._finished(item)
            if tensors and tensor.shape != tensors[0].shape:
                raise InvalidInputError(
                    f"got {_size(tensor)} after preprocessing, expected {_size(tensors[0])} like "
                    "the first image: this model's preprocessing doesn't crop, so a batch needs "
                    "images of one size",
                    image=index,
                )
            tensors.append(tensor)
        return torch.stack(tensors)

    def _finished(self, item: NDArray[np.float32] | Image.Image | None) -> torch.Tensor:
        if item is None:
            raise ValueError("an image was not decoded")
        if isinstance(item, Image.Image):
            return self._preprocess.steps.finish(item, self._preprocess.channels)
        return torch.from_numpy(item)


def _size(tensor: torch.Tensor) -> str:
    return f"{tensor.shape[-1]} x {tensor.shape[-2]} pixels"
