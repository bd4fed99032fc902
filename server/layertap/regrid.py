"""Another grid for the feature maps of a layer: averages over neighbours, and another size."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from numbers import Integral

from layertap.errors import InvalidInputError

__all__ = ["MAX_AROUND", "MAX_SIDE", "NO_REGRID", "Regrid", "Resize"]

MAX_AROUND = 31
"""The largest side of the square over which places are averaged."""

MAX_SIDE = 4096
"""The largest height and width of a grid."""


class Resize(StrEnum):
    """How a grid gets another size; ``layertap.v1.Resize`` has the same names."""

    BILINEAR = "bilinear"
    """Bilinear interpolation, ``align_corners=False``, without antialiasing."""
    AVERAGE_POOL = "average_pool"
    """The mean of the places that fall into each new one, as ``adaptive_avg_pool2d`` takes it."""


@dataclass(frozen=True, slots=True)
class Regrid:
    """What is done to the grid of a layer before a reduction; the result is ``[B, C, H, W]``.

    Attributes:
        around: The side of a square of places, an odd number. Each place becomes the mean of the
            square around it, in which places beyond the edge count as zeros. 1 for no change.
        size: The height and width of the result; None to keep them, or in a concatenation to take
            those of its first layer.
        resize: How the grid gets this size.

    Raises:
        InvalidInputError: If a number is out of its range.
    """

    around: int = 1
    size: tuple[int, int] | None = None
    resize: Resize = Resize.BILINEAR

    def __post_init__(self) -> None:
        if not isinstance(self.resize, Resize):
            object.__setattr__(self, "resize", _resize(self.resize))
        whole = isinstance(self.around, Integral) and self.around % 2 == 1
        if not whole or not 1 <= self.around <= MAX_AROUND:
            raise InvalidInputError(
                f"around: got {self.around}, expected an odd number from 1 to {MAX_AROUND}"
            )
        if self.size is None:
            return
        size = tuple(self.size)
        whole = all(isinstance(side, Integral) and 1 <= side <= MAX_SIDE for side in size)
        if len(size) != 2 or not whole:
            raise InvalidInputError(
                f"size: got {list(size)}, expected a height and a width from 1 to {MAX_SIDE}"
            )
        object.__setattr__(self, "size", (int(size[0]), int(size[1])))

    @classmethod
    def parse(cls, around: str = "", resize: str = "", pool: str = "") -> Regrid:
        """Read the options of a selection: ``3``, ``28x28`` and ``7x7``.

        Raises:
            InvalidInputError: If they are of another form, or both sizes are given.
        """
        if resize and pool:
            raise InvalidInputError(
                f"layer: got resize={resize} and pool={pool}, expected one of them"
            )
        if around and not (around.isascii() and around.isdecimal()):
            raise InvalidInputError(f"around: got {around!r}, expected a number such as 3")
        how = Resize.AVERAGE_POOL if pool else Resize.BILINEAR
        return cls(int(around or 1), _size(pool or resize, "pool" if pool else "resize"), how)


NO_REGRID = Regrid()
"""Leaves values as they are."""


def _size(text: str, name: str) -> tuple[int, int] | None:
    if not text:
        return None
    height, sign, width = text.partition("x")
    if not (sign and text.isascii() and height.isdecimal() and width.isdecimal()):
        raise InvalidInputError(f"{name}: got {text!r}, expected HEIGHTxWIDTH, such as 28x28")
    return int(height), int(width)


def _resize(given: object) -> Resize:
    try:
        return Resize(str(given).lower())
    except ValueError:
        raise InvalidInputError(
            f"resize: got {given!r}, expected one of {', '.join(Resize)}"
        ) from None
