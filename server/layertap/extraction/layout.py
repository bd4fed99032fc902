"""The layout of an activation: which dimensions follow the input's, and which are channels.

A tensor doesn't say so, and its sizes mislead: 256 channels need not be a 16 × 16 grid. So layouts
are found by experiment; see ``layertap.extraction.grid``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

__all__ = ["Geometry", "Layout"]


class Layout(StrEnum):
    """How height, width and channels are arranged; ``layertap.v1.Layout`` has the same names."""

    UNKNOWN = "unknown"
    CHANNELS_FIRST = "channels_first"
    CHANNELS_LAST = "channels_last"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class Geometry:
    """What is known about the layout of an activation whose batch dimension comes first.

    Attributes:
        layout: CHANNELS_FIRST is ``[B, C, (T,) H, W]``, CHANNELS_LAST ``[B, (T,) H, W, C]``, TOKENS
            ``[B, front + H * W, C]``, row by row. UNKNOWN for anything else.
        channels: C. This and the sizes below are 0 if the layout is UNKNOWN.
        height: H.
        width: W.
        front: Tokens in front of the patch tokens.
        positions: If the layout is UNKNOWN: the dimensions that were seen to follow the input's,
            ascending, such as time in a series ``[B, T, C]``.
    """

    layout: Layout = Layout.UNKNOWN
    channels: int = 0
    height: int = 0
    width: int = 0
    front: int = 0
    positions: tuple[int, ...] = ()

    def at(self, shape: Sequence[int], item: Sequence[int], measured: Sequence[int]) -> Geometry:
        """Return the geometry of the same layer for items of another shape.

        Args:
            shape: The activation's shape for a batch of one such item.
            item: The shape of such an item's first input.
            measured: The shape of the item at which this geometry was found.
        """
        if not self.height or tuple(item) == tuple(measured):
            return self
        match self.layout:
            case Layout.CHANNELS_FIRST:
                return replace(self, height=shape[-2], width=shape[-1])
            case Layout.CHANNELS_LAST:
                return replace(self, height=shape[-3], width=shape[-2])
            case _:
                return self._tokens_at(shape[1], item, measured)

    def _tokens_at(self, tokens: int, item: Sequence[int], measured: Sequence[int]) -> Geometry:
        around_height = _around(self.height * item[-2] / measured[-2])
        around_width = _around(self.width * item[-1] / measured[-1])
        for height in around_height:
            for width in around_width:
                if self.front + height * width == tokens:
                    return replace(self, height=height, width=width)
        return Geometry(positions=(1,))


def _around(size: float) -> list[int]:
    """Return the whole numbers near a size, nearest first, as patches may be cut off or padded."""
    nearest = round(size)
    return [nearest, nearest - 1, nearest + 1]
