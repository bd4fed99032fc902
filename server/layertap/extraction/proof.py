"""The proof of an extractor: its values are compared with the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layertap.errors import ExtractorUnsupportedError
from layertap.extraction.base import BuiltExtractor, Values
from layertap.extraction.kinds.base import ExtractorKind
from layertap.extraction.points import CapturePoint, ValueSpec
from layertap.extraction.verify import compiled_tolerance, difference, mismatch
from layertap.models import Batch

__all__ = ["collect", "items_of", "prove", "shares_passes"]


def collect(built: BuiltExtractor, points: Sequence[CapturePoint], x: Batch) -> Values:
    """Run an extractor and return a copy of each point's value, in the order of the points."""
    values: dict[int, torch.Tensor] = {}

    def clone(index: int, value: torch.Tensor) -> None:
        values[index] = value.clone()

    # The model may write into its batch, and the caller uses the batch again.
    built.run(x.clone(), clone)
    return [values[index] for index in range(len(points))]


def prove(
    kind: ExtractorKind,
    built: BuiltExtractor,
    points: Sequence[CapturePoint],
    x: Batch,
    reference: Values,
) -> None:
    """Run an extractor on a batch and compare its values with the reference, within tolerance.

    Raises:
        ExtractorUnsupportedError: If a value differs.
    """
    faults: dict[int, str] = {}

    def compare(index: int, value: torch.Tensor) -> None:
        expected = reference[index]
        faults[index] = mismatch(value, expected, kind.tolerance(expected))

    # The model may write into its batch, and the caller uses the batch again.
    built.run(x.clone(), compare)
    for index, point in enumerate(points):
        if faults[index]:
            raise ExtractorUnsupportedError(
                f"{kind.name} can't serve layer {point.path!r} in this layer set: at batch "
                f"size {x.size} {faults[index]}"
            )


def items_of(value: torch.Tensor, spec: ValueSpec, begin: int, items: int) -> torch.Tensor:
    """Return a view of the part of a value that belongs to some items of the batch.

    Args:
        value: The value for a whole batch.
        spec: The value's dtype and shape; it must have a batch axis.
        begin: The index of the first of these items.
        items: Their number.
    """
    if spec.batch_axis is None:
        raise ValueError("a value without a batch axis has no items")
    axis, size = spec.batch_axis
    return value.narrow(axis, begin * size, items * size)


def shares_passes(
    built: BuiltExtractor,
    points: Sequence[CapturePoint],
    specs: Sequence[ValueSpec],
    x: Batch,
) -> bool:
    """Return whether items don't affect each other, so that requests may share a forward pass.

    A batch is run as a whole and in two parts. If the parts give the same values as the whole,
    within ``compiled_tolerance`` (kernels for other batch sizes may add in another order), no item
    affects another. A model that normalises over the batch, or arranges the windows of all items
    side by side, fails this test.

    Args:
        built: The extractor.
        points: The points that it captures.
        specs: The dtype and shape of each point.
        x: A batch of at least two items.
    """
    if any(spec.batch_axis is None or spec.dynamic for spec in specs):
        return False
    whole = collect(built, points, x)
    for begin, part in ((0, x.narrow(0, 1)), (1, x.narrow(1, x.size - 1))):
        for value, expected, spec in zip(whole, collect(built, points, part), specs, strict=True):
            mine = items_of(value, spec, begin, part.size)
            if difference(mine, expected) > compiled_tolerance(expected):
                return False
    return True
