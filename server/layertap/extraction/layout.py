"""How an activation of an image is laid out: channels first, channels last, or tokens.

A tensor doesn't say which of its dimensions are the image's. The sizes do: height and width of an
activation are those of the input over one stride. That tells Swin's ``[B, H, W, C]`` from ResNet's
``[B, C, H, W]``, and the 14 × 14 patch tokens of a ViT from the class and register tokens in front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from layertap.extraction.points import ValueSpec

__all__ = ["Geometry", "Layout", "geometry"]

MAX_TOKENS_IN_FRONT = 8
"""Class, distillation and register tokens; DINOv2 has the most, one and four."""


class Layout(StrEnum):
    """Which dimensions are the image's; ``layertap.v1.Layout`` has the same names."""

    UNKNOWN = "unknown"
    CHANNELS_FIRST = "channels_first"
    CHANNELS_LAST = "channels_last"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class Geometry:
    """What is known of an activation's layout; all zero where it is UNKNOWN.

    Attributes:
        layout: CHANNELS_FIRST is ``[B, C, (T,) H, W]``, CHANNELS_LAST ``[B, (T,) H, W, C]``, TOKENS
            ``[B, front + H * W, C]``, row by row.
        channels: C.
        height: H.
        width: W.
        front: Tokens in front of the patch tokens.
    """

    layout: Layout = Layout.UNKNOWN
    channels: int = 0
    height: int = 0
    width: int = 0
    front: int = 0


def geometry(spec: ValueSpec, item_shape: Sequence[int]) -> Geometry:
    """Tell an activation's layout from its shape and the input's.

    Args:
        spec: The activation's type and shape; its first dimension must be the batch.
        item_shape: The input's sizes without the batch: ``(C, H, W)`` or ``(C, T, H, W)``; for any
            other rank nothing is known.
    """
    sizes = [dim.size for dim in spec.dims]
    if spec.dynamic or len(item_shape) not in (3, 4) or not sizes or not _batched(spec):
        return Geometry()
    image = (item_shape[-2], item_shape[-1])
    if len(sizes) == len(item_shape) + 1:
        if _scaled(sizes[-2], sizes[-1], image):
            return Geometry(Layout.CHANNELS_FIRST, sizes[1], sizes[-2], sizes[-1])
        if _scaled(sizes[-3], sizes[-2], image):
            return Geometry(Layout.CHANNELS_LAST, sizes[-1], sizes[-3], sizes[-2])
    if len(sizes) == 3 and len(item_shape) == 3:
        grid = _token_grid(sizes[1], image)
        if grid:
            front, height, width = grid
            return Geometry(Layout.TOKENS, sizes[2], height, width, front)
    return Geometry()


def _batched(spec: ValueSpec) -> bool:
    first, *rest = spec.dims
    return first.batch and first.size == 1 and not any(dim.batch for dim in rest)


def _scaled(height: int, width: int, image: tuple[int, int]) -> bool:
    """Tell whether two sizes are the image's over one stride, up to rounding."""
    if not height or not width:
        return False
    return abs(image[1] * height / image[0] - width) < 1 and (
        abs(image[0] * width / image[1] - height) < 1
    )


def _token_grid(tokens: int, image: tuple[int, int]) -> tuple[int, int, int] | None:
    """Return (tokens in front, height, width) of a grid of square patches."""
    for front in range(min(MAX_TOKENS_IN_FRONT, tokens - 1) + 1):
        height = math.isqrt((tokens - front) * image[0] // image[1])
        if not height or image[0] % height:
            continue
        patch = image[0] // height
        width = image[1] // patch
        if width * patch == image[1] and height * width == tokens - front:
            return front, height, width
    # Patches that overlap or are padded have no whole stride; a square image has a square grid.
    for front in (0, 1):
        side = math.isqrt(max(tokens - front, 0))
        if image[0] == image[1] and side > 1 and side * side == tokens - front:
            return front, side, side
    return None
