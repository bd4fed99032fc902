"""Parts of values by named axes: which elements an intervention changes.

The layout that experiments have found (``layertap.extraction.grid``) says which dimension an axis
is. A part is resolved against the shape of an item's value, so a request can be checked before the
model runs wherever that shape is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from layertap.errors import InvalidInputError
from layertap.extraction.layout import Geometry, Layout
from layertap.extraction.operands import ItemAxis
from layertap.extraction.points import ValueSpec
from layertap.intervention import Axis, Intervention, Part

__all__ = ["NamedAxes", "Region", "Selected", "selected"]


_OF_POSITIONS: dict[tuple[int, tuple[int, ...]], dict[Axis, int]] = {
    (1, ()): {Axis.CHANNEL: 0},
    (2, (1,)): {Axis.TOKEN: 0, Axis.CHANNEL: 1},
    (2, (2,)): {Axis.CHANNEL: 0, Axis.TOKEN: 1},
    (3, (2, 3)): {Axis.HEAD: 0},
}
"""The axes of values that are no images, by their dimensions without the batch, and by which of all
dimensions follow the input's; see ``Geometry.positions``."""


class NamedAxes(NamedTuple):
    """Which dimension of an item's value each axis is.

    Attributes:
        dims: The dimension of each axis that the value has; 0 is the first after the batch.
        patches: The layout of a grid whose rows and columns are one dimension of tokens; None if
            they are dimensions of their own, or there is no grid.
    """

    dims: Mapping[Axis, int]
    patches: Geometry | None = None

    @classmethod
    def of(cls, spec: ValueSpec) -> NamedAxes:
        """Return the axes of values of a type and shape."""
        if spec.dynamic or ItemAxis.of(spec).axis is None or ItemAxis.of(spec).per_item != 1:
            return cls({})
        rank, shape = len(spec.dims) - 1, spec.geometry
        by_layout: dict[Layout, dict[Axis, int]] = {
            Layout.CHANNELS_FIRST: {Axis.CHANNEL: 0, Axis.Y: rank - 2, Axis.X: rank - 1},
            Layout.CHANNELS_LAST: {Axis.CHANNEL: rank - 1, Axis.Y: rank - 3, Axis.X: rank - 2},
            Layout.TOKENS: {Axis.TOKEN: 0, Axis.CHANNEL: 1},
        }
        if shape.layout in by_layout:
            patches = shape if shape.layout is Layout.TOKENS else None
            return cls(by_layout[shape.layout], patches)
        return cls(_OF_POSITIONS.get((rank, shape.positions), {}))

    def dimension(self, axis: Axis, what: str) -> int:
        """Return the dimension of an axis; raise InvalidInputError if the value has none."""
        if axis not in self.dims:
            known = ", ".join(self.dims) or "none by name, as the layer's layout is not known"
            raise InvalidInputError(
                f"{what}: got the axis {axis.value!r}, expected one that the layer has: {known}; "
                f"dimensions may be given by number"
            )
        return self.dims[axis]


@dataclass(frozen=True)
class Selected:
    """What an intervention selects of a value.

    Attributes:
        items: The items of the batch.
        dims: The indices along each dimension of an item's value; None for all.
        shape: The shape of the selected part of an item.
        axes: The axes of the value.
    """

    items: Sequence[int]
    dims: tuple[Sequence[int] | None, ...]
    shape: tuple[int, ...]
    axes: NamedAxes

    @property
    def elements(self) -> int:
        """The number of selected elements of an item."""
        product = 1
        for size in self.shape:
            product *= size
        return product

    def over(self, one: Intervention) -> tuple[int, ...]:
        """Return the dimensions of an item's value over which the mean of one is taken."""
        axes = [each for each in one.over if isinstance(each, Axis) and each is not Axis.ITEM]
        if Axis.HEAD in axes and Axis.HEAD not in self.axes.dims:
            raise _refusal(one, "over: got head, expected channel, over the selected heads")
        found = [each for each in one.over if not isinstance(each, Axis)]
        if self.axes.patches is not None and {Axis.Y, Axis.X} & set(axes):
            if not {Axis.Y, Axis.X} <= set(axes) or Axis.TOKEN in axes:
                raise _refusal(one, "over: the rows and columns of tokens: expected both of y, x")
            axes = [each for each in axes if each not in (Axis.Y, Axis.X)]
            found.append(self.axes.dims[Axis.TOKEN])
        found.extend(self.axes.dimension(each, f"intervention {one.name}: over") for each in axes)
        if any(dim >= len(self.shape) for dim in found) or len(set(found)) < len(found):
            raise _refusal(
                one, f"over: got dimensions {found}, expected each once, below {len(self.shape)}"
            )
        return tuple(found)


def selected(one: Intervention, axes: NamedAxes, shape: Sequence[int], size: int) -> Selected:
    """Return what an intervention selects.

    Args:
        one: The intervention.
        axes: The axes of the value.
        shape: The shape of an item's value.
        size: The number of items of the request.

    Raises:
        InvalidInputError: If the value has no such axis, an index is out of range, or the part has
            no elements.
    """
    items: Sequence[int] = range(size)
    dims: list[Sequence[int] | None] = [None] * len(shape)
    try:
        grid = [part for part in one.parts if part.axis in (Axis.Y, Axis.X)]
        for part in one.parts:
            if part.axis is Axis.ITEM:
                items = part.indices(size)
            elif axes.patches is None or part not in grid:
                dim, indices = _along(part, axes, shape)
                _take(dims, dim, indices, part)
        if grid and axes.patches is not None:
            _take(dims, axes.dims[Axis.TOKEN], _patches(grid, axes.patches, shape), grid[0])
    except InvalidInputError as error:
        raise _refusal(one, str(error)) from None
    part_shape = tuple(
        whole if chosen is None else len(chosen) for whole, chosen in zip(shape, dims, strict=True)
    )
    found = Selected(items, tuple(dims), part_shape, axes)
    if not found.elements:
        raise _refusal(one, f"select: an item's value is {list(shape)}, which has no elements")
    return found


def _take(dims: list[Sequence[int] | None], dim: int, indices: Sequence[int], part: Part) -> None:
    if dims[dim] is not None:
        raise InvalidInputError(f"select: {part.name}: another axis selects of dimension {dim} too")
    dims[dim] = indices


def _along(part: Part, axes: NamedAxes, shape: Sequence[int]) -> tuple[int, Sequence[int]]:
    if part.axis is Axis.DIMENSION:
        if part.dimension >= len(shape):
            raise InvalidInputError(
                f"select: {part.name}: an item's value is {list(shape)}, expected a dimension from "
                f"0 to {len(shape) - 1}"
            )
        return part.dimension, part.indices(shape[part.dimension])
    if part.axis is not Axis.HEAD or not part.heads:
        if part.axis is Axis.HEAD and Axis.CHANNEL in axes.dims:
            raise InvalidInputError("select: head: expected heads, the number of heads, too")
        dim = axes.dimension(part.axis, "select")
        return dim, part.indices(shape[dim])
    dim = axes.dimension(Axis.CHANNEL, "select: head")
    each, rest = divmod(shape[dim], part.heads)
    if rest or not each:
        raise InvalidInputError(
            f"select: heads: got {part.heads}, expected a divisor of the {shape[dim]} channels"
        )
    heads = part.indices(part.heads)
    return dim, [head * each + place for head in heads for place in range(each)]


def _patches(parts: Sequence[Part], patches: Geometry, shape: Sequence[int]) -> list[int]:
    given = {part.axis: part for part in parts}
    rows = given[Axis.Y].indices(patches.height) if Axis.Y in given else range(patches.height)
    columns = given[Axis.X].indices(patches.width) if Axis.X in given else range(patches.width)
    if patches.front + patches.height * patches.width != shape[0]:
        raise InvalidInputError(f"select: the grid of {shape[0]} tokens is not known")
    return [patches.front + row * patches.width + column for row in rows for column in columns]


def _refusal(one: Intervention, what: str) -> InvalidInputError:
    return InvalidInputError(f"intervention {one.name}: {what}")


class Region:
    """A part of a tensor ``[rows, ...]``: the product of indices along each dimension.

    Args:
        rows: The rows.
        dims: The indices along each other dimension; None for all.
        whole: The shape of the tensor.
        device: Its device.
    """

    def __init__(
        self,
        rows: Sequence[int],
        dims: Sequence[Sequence[int] | None],
        whole: Sequence[int],
        device: torch.device,
    ) -> None:
        given = [
            rows,
            *(range(n) if d is None else d for d, n in zip(dims, whole[1:], strict=True)),
        ]
        self._slices = [_slice(each) for each in given]
        self._given, self._device = given, device

    def read(self, items: torch.Tensor) -> torch.Tensor:
        """Return the part: a view if each dimension's indices have equal distances."""
        for dim, (piece, indices) in enumerate(zip(self._slices, self._given, strict=True)):
            if piece is not None:
                items = items[(slice(None),) * dim + (piece,)]
            else:
                items = items.index_select(dim, torch.tensor(indices, device=self._device))
        return items

    def write(self, items: torch.Tensor, part: torch.Tensor) -> None:
        """Put the part there, in place."""
        if all(piece is not None for piece in self._slices):
            items[tuple(self._slices)] = part
            return
        rank = len(self._given)
        index = [
            torch.tensor(list(each), device=self._device).reshape(
                [-1 if dim == at else 1 for at in range(rank)]
            )
            for dim, each in enumerate(self._given)
        ]
        items[tuple(index)] = part


def _slice(indices: Sequence[int]) -> slice | None:
    """Return the slice of ascending indices with equal distances; None for any others."""
    first, last = indices[0], indices[-1]
    step = indices[1] - first if len(indices) > 1 else 1
    if step < 1 or list(indices) != list(range(first, last + 1, step)):
        return None
    return slice(first, last + 1, step)
