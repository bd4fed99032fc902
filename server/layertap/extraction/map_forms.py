"""Maps at the size of the model's input, and maps as colours over the image."""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

from layertap.errors import InvalidInputError, ModelRunError
from layertap.extraction.points import Dim, ValueSpec
from layertap.extraction.reductions import Reduced
from layertap.models import BatchKey
from layertap.selection import MapForm

__all__ = ["shaped_map"]

WEIGHT = 0.75
"""How much of a pixel the colour of the largest magnitude covers."""

POSITIVE, NEGATIVE = (255.0, 32.0, 0.0), (0.0, 64.0, 255.0)
"""The colours of positive and of negative numbers, red, green and blue."""

LUMA = (0.299, 0.587, 0.114)
"""The weights of red, green and blue in a gray pixel (ITU-R BT.601)."""


def shaped_map(
    form: MapForm, spec: ValueSpec, layer: str, key: BatchKey, pictures: torch.Tensor | None
) -> Reduced:
    """Return what brings maps ``[B, H, W]`` into a form that is not the layer's grid.

    Args:
        form: RESIZED or OVERLAY; see `MapForm`.
        spec: The dtype and shape of the maps.
        layer: The layer's name, for the error message.
        key: The shapes of the batch's items; the first one is the input whose size is taken.
        pictures: The images that the model is given, ``[B, H, W, 3] uint8``; None if none are
            known.

    Raises:
        InvalidInputError: If the maps are not ``[B, H, W]``, the input is not an image, or there
            are no images for an overlay.
    """
    item = key.items[0].shape
    if len(spec.dims) != 3 or len(item) != 3:
        raise InvalidInputError(
            f"map: {form.name} takes maps [B, H, W] of a model whose first input is an image "
            f"[C, H, W], but the map of layer {layer!r} has {len(spec.dims)} dimensions and the "
            f"input is {list(item)}"
        )
    height, width = item[-2:]

    def resize(maps: torch.Tensor) -> torch.Tensor:
        wide = maps.detach().to(torch.promote_types(maps.dtype, torch.float32)).unsqueeze(1)
        large = interpolate(wide, (height, width), mode="bilinear", align_corners=False)
        return large.squeeze(1)

    dims = (spec.dims[0], Dim(height), Dim(width))
    if form is MapForm.RESIZED:
        return Reduced(ValueSpec(spec.dtype, dims), lambda maps: resize(maps).to(spec.dtype))
    if pictures is None:
        raise InvalidInputError(
            f"map: OVERLAY takes a model with image preprocessing whose mean and standard "
            f"deviation are known, or that declares them; ask for RESIZED instead for {layer!r}"
        )
    if tuple(pictures.shape[1:]) != (height, width, 3):
        raise AssertionError("pictures have the size of the input")

    def overlay(maps: torch.Tensor) -> torch.Tensor:
        large = resize(maps).cpu()
        if not large.isfinite().all():
            raise ModelRunError(f"the map of layer {layer!r} holds NaN or infinity on this input")
        return _overlay(large, pictures)

    return Reduced(ValueSpec(torch.uint8, (*dims, Dim(3))), overlay)


def _overlay(maps: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Return maps ``[B, H, W]`` as colours over images ``[B, H, W, 3] uint8``."""
    largest = maps.abs().amax((1, 2), keepdim=True)
    strength = torch.where(largest > 0, maps / largest, torch.zeros_like(maps)).to(torch.float32)
    gray = (pictures.to(torch.float32) @ torch.tensor(LUMA)).unsqueeze(-1)
    colour = torch.where(
        strength.unsqueeze(-1) >= 0, torch.tensor(POSITIVE), torch.tensor(NEGATIVE)
    )
    weight = WEIGHT * strength.abs().unsqueeze(-1)
    mixed = gray * (1 - weight) + colour * weight
    return mixed.round().clamp(0, 255).to(torch.uint8)
