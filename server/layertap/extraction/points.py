"""Where in a forward pass a value is captured, and the shape it has there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch

from layertap.extraction.dimensions import Expression, Sizes
from layertap.extraction.layout import Geometry
from layertap.selection import Capture

__all__ = ["CapturePoint", "Dim", "PointKind", "Sink", "ValueObserver", "ValueSpec"]

ValueObserver = Callable[[str, Capture, Any], None]
"""Takes (module path, side, the value that the module returned or was given)."""

Sink = Callable[[int, torch.Tensor], None]
"""Takes (index of a capture point, its live tensor); must copy what it needs before returning."""


class PointKind(StrEnum):
    """What a capture point is attached to."""

    MODULE = "module"
    NODE = "node"


@dataclass(frozen=True, slots=True)
class CapturePoint:
    """One value of one forward pass.

    Attributes:
        kind: MODULE for a module's call, NODE for a node of the symbolic graph.
        path: The module's path, or the node's torchvision name.
        capture: The call's output or its input.
        call: Which call of the module, from 0.
        member: The way into a container value: indices and keys as text; empty for a plain tensor.
    """

    kind: PointKind
    path: str
    capture: Capture = Capture.OUTPUT
    call: int = 0
    member: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dim:
    """One dimension: ``size`` elements, or ``size`` for each item of the batch.

    Attributes:
        size: Elements for items of the default size.
        batch: Whether it grows with the batch.
        expression: How ``size`` follows the free dimensions of the inputs; None where that is not
            known, so that ``size`` may be another one for items of another size.
    """

    size: int
    batch: bool = False
    expression: Expression | None = None

    def at(self, batch: int) -> int:
        """Return the elements along it for a batch of that many items."""
        return self.size * batch if self.batch else self.size


@dataclass(frozen=True, slots=True)
class ValueSpec:
    """A value's type and shape, as measured at two batch sizes.

    Attributes:
        dtype: The element type.
        dims: Outermost first.
        dynamic: Whether the shape follows something other than the batch size; ``dims`` is then
            the shape of a batch of one.
        geometry: What is known of its layout, once the batch is in front.
        interleaved: Whether the elements that each item has along the batch dimension are not next
            to each other, as where ``[L, B, D]`` was made into ``[L * B, D]``.
        quantized: The quantised type of the model's own value, such as ``"quint8"``, of which
            ``dtype`` is the dequantised one; empty for a value that is not quantised.
    """

    dtype: torch.dtype
    dims: tuple[Dim, ...]
    dynamic: bool = False
    geometry: Geometry = field(default_factory=Geometry)
    interleaved: bool = False
    quantized: str = ""

    @classmethod
    def from_batches(
        cls, dtype: torch.dtype, one: Sequence[int], two: Sequence[int] | None
    ) -> ValueSpec:
        """Tell batch dimensions from fixed ones by the shapes at batch 1 and batch 2."""
        if two is None or len(one) != len(two):
            return cls(dtype, tuple(Dim(size) for size in one), dynamic=True)
        dims = tuple(Dim(a, batch=a != b) for a, b in zip(one, two, strict=True))
        grows = all(b == a or b == 2 * a for a, b in zip(one, two, strict=True))
        return cls(dtype, dims, dynamic=not grows)

    def shape(self, batch: int) -> tuple[int, ...]:
        """Return the shape for a batch of that many items."""
        return tuple(dim.at(batch) for dim in self.dims)

    def following(self, expressions: Sequence[Expression | None]) -> ValueSpec:
        """Return the spec with the expression of each dimension, for one item."""
        dims = tuple(
            replace(dim, expression=expression)
            for dim, expression in zip(self.dims, expressions, strict=True)
        )
        return replace(self, dims=dims)

    def at(self, sizes: Sizes) -> ValueSpec | None:
        """Return the spec for items of other sizes; None if that can't be predicted.

        What is known of the layout stays that of the default size.

        Args:
            sizes: The size of each named free dimension of the inputs.
        """
        if self.dynamic:
            return None
        dims = []
        for dim in self.dims:
            if dim.expression is None or (size := dim.expression.at(sizes)) < 0:
                return None
            dims.append(replace(dim, size=size))
        return replace(self, dims=tuple(dims))

    @property
    def batch_axis(self) -> tuple[int, int] | None:
        """Return (the one dimension that grows with the batch, its elements for each item).

        None if there is no such dimension, or more than one, or where the elements of an item
        along it are interleaved with those of others.
        """
        if self.interleaved:
            return None
        axes = [(axis, dim.size) for axis, dim in enumerate(self.dims) if dim.batch]
        return axes[0] if len(axes) == 1 else None

    @property
    def bytes_per_item(self) -> int:
        """Bytes of a batch of one."""
        elements = 1
        for dim in self.dims:
            elements *= dim.size
        return elements * self.dtype.itemsize
