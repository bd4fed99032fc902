"""Brings the grid of a layer's values to another size; see ``layertap.regrid``.

Sources: the averages over a square around each place are the locally aware patch features of
PatchCore (Roth et al. 2022, arXiv:2106.08265), which are brought to one grid by bilinear
interpolation, too.
"""

from __future__ import annotations

import torch
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, interpolate

from layertap.errors import InvalidInputError
from layertap.extraction.layout import Geometry, Layout
from layertap.extraction.points import Dim, ValueSpec
from layertap.extraction.reductions import Reduced, reduced
from layertap.models import BatchKey
from layertap.regrid import Regrid, Resize
from layertap.selection import Reduction

__all__ = ["regridded"]


def regridded(spec: ValueSpec, regrid: Regrid, layer: str, key: BatchKey, asked: str) -> Reduced:
    """Return what brings values of a layer to ``[B, C, H, W]`` with another grid.

    The numbers are computed in float32, or in the dtype of the values if that is wider, and have
    the dtype of the values.

    Args:
        spec: The dtype and shape of the values.
        regrid: The averages and the size of the result.
        layer: The layer's name, for the error message.
        key: The shapes of the batch's items, for the error message.
        asked: What the caller asked for, for the error message.

    Raises:
        InvalidInputError: If the values have no grid of height and width, or are no floating-point
            numbers.
    """
    grid = reduced(spec, Reduction.TOKEN_GRID, layer, key, asked=asked)
    if len(grid.spec.dims) != 4 or not spec.dtype.is_floating_point:
        shape = list(grid.spec.shape(1))
        raise InvalidInputError(
            f"{asked} takes a floating-point grid of height and width, but layer {layer!r} is "
            f"{spec.dtype} {shape}"
        )
    batch, channels, *sides = grid.spec.dims
    height, width = regrid.size or (sides[0].size, sides[1].size)
    geometry = Geometry(Layout.CHANNELS_FIRST, channels.size, height, width)
    dims = (batch, channels, Dim(height), Dim(width))
    made = ValueSpec(spec.dtype, dims, geometry=geometry)
    wide = torch.promote_types(spec.dtype, torch.float32)

    def apply(value: torch.Tensor) -> torch.Tensor:
        value = grid.apply(value)
        if regrid.around == 1 and tuple(value.shape[2:]) == (height, width):
            return value
        # Half precision would round each sum, and not every kernel has it. Kernels for other orders
        # of memory add in another order, so the layout of a layer would show in the last bits.
        value = value.detach().to(wide).contiguous()
        if regrid.around > 1:
            value = avg_pool2d(value, regrid.around, stride=1, padding=regrid.around // 2)
        if tuple(value.shape[2:]) != (height, width):
            value = _resized(value, (height, width), regrid.resize)
        return value.to(spec.dtype)

    return Reduced(made, apply)


def _resized(value: torch.Tensor, size: tuple[int, int], resize: Resize) -> torch.Tensor:
    if resize is Resize.AVERAGE_POOL:
        return adaptive_avg_pool2d(value, size)
    return interpolate(value, size, mode="bilinear", align_corners=False)
