"""Multiplies the channels of a value by a matrix that the caller sends; ``layertap.projection``."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from layertap.errors import InvalidInputError
from layertap.extraction.layout import Layout
from layertap.extraction.points import Dim, ValueSpec
from layertap.extraction.reductions import Reduced
from layertap.projection import Projection

__all__ = ["Matrix", "projected"]


@dataclass(frozen=True, slots=True)
class Matrix:
    """The numbers of a projection, on the CPU, in float32 or wider.

    Attributes:
        weight: ``[K, C]``.
        mean: ``[C]``: what is subtracted from the values; None for nothing.
    """

    weight: torch.Tensor
    mean: torch.Tensor | None

    @classmethod
    def of(cls, given: Projection) -> Matrix:
        """Return the numbers of a projection."""
        weight = _tensor(given.matrix)
        mean = None if given.mean is None else _tensor(given.mean)
        return cls(weight, mean)

    @staticmethod
    def nbytes(given: Projection) -> int:
        """Return the bytes of memory that ``of`` takes."""
        return sum(
            array.size * max(array.itemsize, 4)
            for array in (given.matrix, given.mean)
            if array is not None
        )


def _tensor(array: np.ndarray) -> torch.Tensor:
    wide = np.float64 if array.dtype == np.float64 else np.float32
    return torch.from_numpy(np.array(array, wide))


def projected(spec: ValueSpec, matrix: Matrix, name: str, *, ragged: bool = False) -> Reduced:
    """Return what projects the channels of values; all other dimensions stay where they are.

    The product is computed in the widest of float32, the dtype of the values and that of the
    matrix. The result is float64 if the values are, and float32 otherwise.

    Args:
        spec: The dtype and shape of the values.
        matrix: What they are multiplied by.
        name: The layers' names, for error messages.
        ragged: Whether they are ``[N, C]``, the values of all items one after the other.

    Raises:
        InvalidInputError: If it is not known which dimension the channels are, or their number is
            not that of the matrix.
    """
    axis = 1 if ragged else _channel_axis(spec)
    if axis is None or spec.dynamic or not spec.dtype.is_floating_point:
        raise InvalidInputError(
            f"projection: takes floating-point values whose channels are known, but {name!r} is "
            f"{spec.dtype} {list(spec.shape(1))} for one item; use a reduction such as FLATTEN"
        )
    channels, (rows, columns) = spec.dims[axis].size, matrix.weight.shape
    if channels != columns:
        raise InvalidInputError(
            f"projection: matrix: got [{rows}, {columns}], expected [K, {channels}], as {name!r} "
            f"has {channels} channels"
        )
    dtype = torch.promote_types(spec.dtype, torch.float32)
    wide = torch.promote_types(dtype, matrix.weight.dtype)
    dims = (*spec.dims[:axis], Dim(rows), *spec.dims[axis + 1 :])

    def apply(value: torch.Tensor) -> torch.Tensor:
        last = value.detach().movedim(axis, -1).to(wide)
        if matrix.mean is not None:
            last = last - matrix.mean.to(value.device, wide)
        product = last @ matrix.weight.to(value.device, wide).T
        return product.movedim(-1, axis).to(dtype)

    return Reduced(replace(spec, dtype=dtype, dims=dims), apply)


def _channel_axis(spec: ValueSpec) -> int | None:
    """Return which dimension the channels are; None if that is not known."""
    batch = spec.batch_axis
    if batch is None or batch[1] != 1:
        return None
    front = _channels_in_front(spec)
    if front is None:
        return None
    others = [axis for axis in range(len(spec.dims)) if axis != batch[0]]
    return others[front - 1]


def _channels_in_front(spec: ValueSpec) -> int | None:
    """Return which dimension the channels are once the batch dimension is first."""
    rank, geometry = len(spec.dims), spec.geometry
    if rank == 2:
        return 1
    match geometry.layout:
        case Layout.CHANNELS_FIRST:
            return 1
        case Layout.CHANNELS_LAST | Layout.TOKENS:
            return rank - 1
    rest = [axis for axis in range(1, rank) if axis not in geometry.positions]
    return rest[0] if geometry.positions and len(rest) == 1 else None
