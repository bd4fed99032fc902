"""What a plan is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from layertap.extraction.base import BuiltExtractor
from layertap.extraction.points import CapturePoint, ValueSpec
from layertap.selection import Extractor

__all__ = ["Plan", "quoted"]


@dataclass
class Plan:
    """A proven way to capture a list of points from batches of one item shape.

    Attributes:
        extractor: Which of the five it is.
        points: What it captures.
        item_shape: The sizes of one item, without the batch.
        specs: The type and shape of each point's value, in the order of the points.
        built: The extractor itself; it runs on a compute thread only.
        sizes: The batch sizes at which it was held against the oracle, and why it can't serve
            them; empty texts where it can.
        dynamic: Whether some value's shape follows more than the batch size, so that the specs
            predict nothing. Set when a forward pass shows it.
        alone: Whether each request needs a forward pass of its own; None until it was tried.
        shared: Where not: whether requests may share a pass of so many items in all, for those
            numbers that were tried.
    """

    extractor: Extractor
    points: tuple[CapturePoint, ...]
    item_shape: tuple[int, ...]
    specs: tuple[ValueSpec, ...]
    built: BuiltExtractor
    sizes: dict[int, str] = field(default_factory=dict)
    dynamic: bool = False
    alone: bool | None = None
    shared: dict[int, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dynamic = self.dynamic or any(spec.dynamic for spec in self.specs)

    def refusal(self, size: int) -> str | None:
        """Return why it can't serve a batch size; empty if it can, None if that is not known."""
        return "" if self.extractor is Extractor.HOOK else self.sizes.get(size)


def quoted(points: Sequence[CapturePoint]) -> str:
    """Return the paths of points as an error quotes them."""
    return ", ".join(repr(point.path) for point in points)
