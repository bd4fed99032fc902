"""Converts a request's input to a batch on the model's device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from layertap.errors import InvalidInputError
from layertap.models import Batch, ImageLimits, LoadedModel
from layertap.settings import Limits
from layertap.silence import warnings_ignored
from layertap.wire.tensors import TensorView

__all__ = [
    "ImagesInput",
    "TensorsInput",
    "batch_bytes",
    "check_tensors",
    "decode_images",
    "preprocess_images",
]

with warnings_ignored():
    # torch warns once per process that it can't protect a read-only buffer from being written to.
    # A request's bytes belong to that request alone, and models that write into their batch get a
    # copy, so this triggers the warning once, where it is ignored.
    torch.from_numpy(np.frombuffer(b"\0", np.uint8))


@dataclass(frozen=True, slots=True)
class TensorsInput:
    """A batch of tensors for the model.

    Attributes:
        tensors: One tensor per input, by name; the name may be empty for a model's only input.
    """

    tensors: tuple[TensorView, ...]


@dataclass(frozen=True, slots=True)
class ImagesInput:
    """Encoded images, one per item."""

    images: Sequence[bytes]


_PIXEL_BYTES = 4
"""Bytes per pixel: Pillow stores a pixel of an RGB image in four bytes."""

KEPT_IMAGES = 4
"""Limit on a request's resized images in total, as a multiple of the largest allowed image.

A file of a few kilobytes can have as many pixels as one image may have. Without this limit, nothing
would bound the total of a request with a thousand such files.
"""


def check_tensors(model: LoadedModel, views: Sequence[TensorView], limits: Limits) -> Batch:
    """Check a request's tensors; return them as a batch on the CPU, without a copy.

    Raises:
        InvalidInputError: A name, rank, size, dtype or the batch size is not what the model takes.
    """
    signature = model.signature
    given = {view.name: view for view in views}
    if len(given) != len(views):
        names = ", ".join(repr(view.name) for view in views)
        raise InvalidInputError(f"inputs: got {names}, expected each name once")
    _check_size(
        signature.check({name: (view.shape, view.dtype.name) for name, view in given.items()}),
        limits,
    )
    unnamed = given.get("")
    return Batch({spec.name: _tensor(unnamed or given[spec.name]) for spec in signature.inputs})


def _tensor(view: TensorView) -> torch.Tensor:
    if view.dtype.name == "bfloat16":
        return torch.from_numpy(view.array().view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(view.array())


def decode_images(
    model: LoadedModel,
    images: Sequence[bytes],
    limits: Limits,
    admit: Callable[[int], object] = lambda nbytes: None,
) -> list[Image.Image]:
    """Decode a batch of image files; resize and crop them with PIL.

    This runs no torch code, so any thread may call it. That leaves the compute threads free.

    Args:
        model: The model that takes them.
        images: Encoded files.
        limits: The limits of requests.
        admit: Called with the bytes of each decoded image; may raise OverloadedError.

    Raises:
        OverloadedError: If ``admit`` raises it.
        InvalidInputError: If there are no images or too many, a file can't be decoded or resized,
            the images have too many pixels in total, or the model takes no images.
    """
    if model.preprocess is None:
        raise InvalidInputError(
            f"images: model {model.name!r} takes none, expected "
            f"{', '.join(f'{spec.name} {spec.pattern}' for spec in model.signature.inputs)}"
        )
    if not images:
        raise InvalidInputError("images: got none, expected at least one")
    _check_size(len(images), limits)
    image_limits = ImageLimits(max_pixels=limits.pixels)
    kept: list[Image.Image] = []
    room = limits.pixels * KEPT_IMAGES
    for index, data in enumerate(images):
        kept.append(model.preprocess.decode(data, index, image_limits))
        admit(kept[-1].width * kept[-1].height * _PIXEL_BYTES)
        room -= kept[-1].width * kept[-1].height
        if room < 0:
            raise InvalidInputError(
                f"with this one, the request has more than {limits.pixels * KEPT_IMAGES} pixels in "
                f"the sizes in which model {model.name!r} takes images, the most allowed in all; "
                f"send fewer images at once",
                image=index,
            )
    return kept


def batch_bytes(model: LoadedModel, images: Sequence[Image.Image]) -> int:
    """Return the size in bytes of the batch that ``preprocess_images`` will return."""
    main = model.signature.main
    return len(images) * math.prod(main.shape) * main.dtype.itemsize


def preprocess_images(model: LoadedModel, images: Sequence[Image.Image]) -> Batch:
    """Convert decoded images to a batch ``[B, C, H, W]`` for the model's first input.

    Call this on a compute thread only.

    Raises:
        InvalidInputError: If the preprocessed images differ in size, or have a size that the model
            doesn't take.
    """
    if model.preprocess is None:
        raise ValueError("decode_images refuses models that take no images")
    x, main = model.preprocess.batch(images), model.signature.main
    try:
        # The dtype is not checked: the batch is float32, and is converted to the model's dtype.
        main.check(x.shape, main.dtype_name)
    except InvalidInputError as error:
        raise InvalidInputError(
            f"images: got {list(x.shape)} after preprocessing, expected {main.pattern} as "
            f"model {model.name!r} takes, such as {list(main.batch_shape(1))}"
        ) from error
    return Batch({main.name: x})


def _check_size(size: int, limits: Limits) -> None:
    if size > limits.batch:
        raise InvalidInputError(f"input: got a batch of {size}, expected at most {limits.batch}")
