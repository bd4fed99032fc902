"""The proof of an extractor: its values held against the oracle's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layertap.errors import ExtractorUnsupportedError
from layertap.extraction.base import BuiltExtractor
from layertap.extraction.points import CapturePoint
from layertap.extraction.verify import TORCHSCRIPT_TOLERANCE, difference
from layertap.selection import Extractor

__all__ = ["Values", "collect", "prove"]

Values = list[torch.Tensor]


def collect(built: BuiltExtractor, points: Sequence[CapturePoint], x: torch.Tensor) -> Values:
    """Run an extractor and return a clone of every point's value, in the order of the points."""
    values: dict[int, torch.Tensor] = {}

    def clone(index: int, value: torch.Tensor) -> None:
        values[index] = value.clone()

    # The model may write into its batch, and the caller uses the batch again.
    built.run(x.clone(), clone)
    return [values[index] for index in range(len(points))]


def prove(
    extractor: Extractor,
    built: BuiltExtractor,
    points: Sequence[CapturePoint],
    x: torch.Tensor,
    oracle: Values,
) -> None:
    """Run an extractor on a batch and hold it against what the oracle gave for it.

    Bit for bit, TORCHSCRIPT within TORCHSCRIPT_TOLERANCE.

    Raises:
        ExtractorUnsupportedError: Where a value differs.
    """
    compiled = extractor is Extractor.TORCHSCRIPT
    for point, value, expected in zip(points, collect(built, points, x), oracle, strict=True):
        error = difference(value, expected)
        tolerance = TORCHSCRIPT_TOLERANCE.get(expected.dtype, 0.0) if compiled else 0.0
        if error > tolerance:
            raise ExtractorUnsupportedError(
                f"{extractor.name} can't serve layer {point.path!r} in this layer set: its value "
                f"differs from the model's by {error:.1e} of the largest magnitude "
                f"(allowed: {tolerance:.0e})"
            )
