"""What a model takes, checked at the door: a wrong shape fails late and obscurely inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from layertap.errors import InvalidInputError

__all__ = ["InputSpec"]

# The last n names stand for the last n dimensions: video is [T, H, W], images [H, W].
_SPATIAL_NAMES = {0: (), 1: ("L",), 2: ("H", "W"), 3: ("T", "H", "W")}


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The tensor a model takes: ``[B, *item_shape]``, the batch first.

    Attributes:
        item_shape: Sizes of the default item without the batch, such as ``(3, 224, 224)``.
        spatial: How many trailing dimensions may vary (0 to 3); the others are fixed.
        dtype: The element type that the model computes with.
        also: Element types that are converted to it.
    """

    item_shape: tuple[int, ...]
    spatial: int = 0
    dtype: torch.dtype = torch.float32
    also: tuple[torch.dtype, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.spatial <= min(3, len(self.item_shape)):
            raise ValueError(f"spatial: got {self.spatial} for an item of {self.item_shape}")

    @property
    def dtype_name(self) -> str:
        """The element type's name in the protocol, such as ``"float32"``."""
        return _name(self.dtype)

    @property
    def pattern(self) -> str:
        """The shape in words, such as ``"[B, 3, H, W]"``."""
        fixed = self.item_shape[: len(self.item_shape) - self.spatial]
        return f"[{', '.join(['B', *map(str, fixed), *_SPATIAL_NAMES[self.spatial]])}]"

    def batch_shape(self, batch: int) -> tuple[int, ...]:
        """Return the shape of a batch of default items."""
        return (batch, *self.item_shape)

    def check(self, shape: Sequence[int], dtype_name: str) -> None:
        """Accept a batch's shape and dtype name, or say what was expected instead.

        Raises:
            InvalidInputError: the dtype, the rank or a fixed size is wrong, or a size is zero.
        """
        if dtype_name not in map(_name, (self.dtype, *self.also)):
            others = "".join(f", or {_name(dtype)}" for dtype in self.also)
            raise InvalidInputError(
                f"tensor: got dtype {dtype_name}, expected {self.dtype_name}, the model's own"
                f"{others}"
            )
        fixed = len(self.item_shape) - self.spatial
        right = (
            len(shape) == len(self.item_shape) + 1
            and min(shape) >= 1
            and tuple(shape[1 : fixed + 1]) == self.item_shape[:fixed]
        )
        if not right:
            raise InvalidInputError(
                f"tensor: got shape {list(shape)}, expected {self.pattern} (batch first, no size "
                f"zero), such as {list(self.batch_shape(1))}"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
