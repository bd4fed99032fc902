"""The inputs of torchvision models: the tensor, and the preprocessing of images."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models import MaxVit, VisionTransformer
from torchvision.models.video import MViT

from layertap.errors import InvalidInputError, ModelLoadError
from layertap.models.preprocess import Preprocess
from layertap.models.signature import InputSpec
from layertap.models.torchvision_catalogue import Builder, Family

__all__ = ["input_spec", "preprocess"]

# The position encodings of these models are made for one image size.
_FIXED_SIZE = (VisionTransformer, MaxVit, MViT)

# Families whose transforms don't crop, with sizes that are cheap enough for warming up.
_UNCROPPED = {Family.DETECTION: (256, 256), Family.SEGMENTATION: (224, 224)}
_FRAMES = 16


def input_spec(
    builder: Builder, member: Any, module: nn.Module, item: tuple[int, ...] | None
) -> InputSpec:
    """Return the module's input. If ``item`` is not None, it is the default item.

    Raises:
        ModelLoadError: The model can't take such an item.
    """
    natural = _natural_shape(builder, member, module)
    free = () if isinstance(module, _FIXED_SIZE) else tuple(range(1, len(natural)))
    own = InputSpec(natural, free)
    if item is None:
        return own
    try:
        own.check((1, *item), own.dtype_name)
    except InvalidInputError as error:
        raise ModelLoadError(
            f"item shape of {builder.name}: got {list(item)}, expected what fits "
            f"{own.pattern}, such as {list(natural)}"
        ) from error
    return InputSpec(item, free)


def preprocess(family: Family, member: Any, takes: InputSpec) -> Preprocess | None:
    """Return the preprocessing of the member's transforms, cropped to the default item.

    None for video models, as an image is not a clip.
    """
    if family is Family.VIDEO:
        return None
    transform = member.transforms()
    height, width = takes.shape[-2:]
    crop = getattr(transform, "crop_size", None)
    if crop and (crop[0], crop[-1]) != (height, width):
        # Keep the same field of view at another size.
        scale = max(height, width) / crop[0]
        transform.resize_size = [round(size * scale) for size in transform.resize_size]
        transform.crop_size = [height] if height == width else [height, width]
    return Preprocess.of(transform, f"torchvision's {member}")


def _natural_shape(builder: Builder, member: Any, module: nn.Module) -> tuple[int, ...]:
    if builder.family in _UNCROPPED:
        return (3, *_UNCROPPED[builder.family])
    if isinstance(module, VisionTransformer):
        return (3, module.image_size, module.image_size)
    crop = list(member.transforms().crop_size)
    if builder.family is Family.VIDEO:
        if builder.name.startswith("swin3d"):
            # This model takes any size, and 224 x 224 takes seconds per clip on a CPU.
            crop = [112, 112]
        return (3, _FRAMES, *crop)
    return (3, crop[0], crop[-1])
