"""Where in a forward pass a value is captured, and the shape it has there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch

from layertap.extraction.dimensions import Expression, Sizes
from layertap.extraction.layout import Geometry
from layertap.selection import Capture, Method, Sweep

__all__ = ["CapturePoint", "Dim", "PointKind", "Sink", "ValueObserver", "ValueSpec"]

ValueObserver = Callable[[str, Capture, Any], None]
"""Takes (module path, side, the value that the module returned or was given); see ``observe``."""

Sink = Callable[[int, torch.Tensor], None]
"""Takes (index of a capture point, its tensor). It must copy the tensor before it returns.

Later code of the model may overwrite the tensor.
"""


class PointKind(StrEnum):
    """What a capture point is attached to."""

    MODULE = "module"
    NODE = "node"
    INPUT = "input"
    """A tensor that the model was given."""
    OBJECTIVE = "objective"
    """The objective of a pass, which only passes with gradients have."""
    INTERVENTIONS = "interventions"
    """What the interventions of a pass changed."""


@dataclass(frozen=True, slots=True)
class CapturePoint:
    """One value of one forward pass.

    Attributes:
        kind: What it is attached to.
        path: The module's path; the node's name in torchvision's naming; the name of the model's
            input; for the objective, ``value`` or ``index``; or for interventions, what is told.
        capture: Whether it is the call's output or its input.
        call: Which call of the module it is, or which of the objective's indices; counted from 0.
        member: The indices and keys that lead to it in a container; empty for a plain tensor.
        gradient: Whether the gradient of the pass's objective with respect to the value is
            captured instead of the value.
        method: What is made of that gradient.
        sweep: The options of the method; None if it takes only one gradient.
        companion: Whether not the method's result is captured but the number of each item that
            comes with it. For integrated gradients it is the gap: their sum, less the difference of
            the objective from the baseline to the value. For guided backpropagation it is the
            number of ReLUs on the way from the objective to the value.
    """

    kind: PointKind
    path: str
    capture: Capture = Capture.OUTPUT
    call: int = 0
    member: tuple[str, ...] = ()
    gradient: bool = False
    method: Method = Method.GRADIENT
    sweep: Sweep | None = None
    companion: bool = False

    @property
    def as_gradient(self) -> CapturePoint:
        """The point of the gradient itself, for a point of something made of it."""
        return replace(self.value, gradient=True) if self.gradient else self

    @property
    def value(self) -> CapturePoint:
        """The point of the value itself."""
        return CapturePoint(self.kind, self.path, self.capture, self.call, self.member)

    @property
    def report_name(self) -> str:
        """The name in the reply, if it tells something about the objective or interventions."""
        number = f"_{self.call}" if self.call else ""
        return f"{self.kind}.{self.path}{number}"

    @property
    def is_report(self) -> bool:
        """Whether it tells something about the objective or interventions, and is no value."""
        return self.kind in (PointKind.OBJECTIVE, PointKind.INTERVENTIONS)


@dataclass(frozen=True, slots=True)
class Dim:
    """One dimension: ``size`` elements, or ``size`` per item of the batch.

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
        """Return the size of the dimension for a batch of that many items."""
        return self.size * batch if self.batch else self.size


@dataclass(frozen=True, slots=True)
class ValueSpec:
    """A value's dtype and shape, as measured at two batch sizes.

    Attributes:
        dtype: The dtype.
        dims: The dimensions, outermost first.
        dynamic: Whether the shape depends on more than the batch size. If so, ``dims`` is the shape
            for a batch of one.
        geometry: What is known about its layout once the batch dimension is first.
        interleaved: Whether the elements of each item are not adjacent along the batch dimension,
            for example because ``[L, B, D]`` was reshaped to ``[L * B, D]``.
        quantized: The model's own quantised dtype, such as ``"quint8"``; ``dtype`` is then that of
            the dequantised value. Empty if the value is not quantised.
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
        """Find the batch dimensions by comparing the shapes at batch 1 and batch 2."""
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
        """Return (the only dimension that grows with the batch, its elements per item).

        None if no dimension or more than one grows, or if the items are interleaved along it.
        """
        if self.interleaved:
            return None
        axes = [(axis, dim.size) for axis, dim in enumerate(self.dims) if dim.batch]
        return axes[0] if len(axes) == 1 else None

    @property
    def bytes_per_item(self) -> int:
        """Size of the value for a batch of one, in bytes."""
        elements = 1
        for dim in self.dims:
            elements *= dim.size
        return elements * self.dtype.itemsize
