"""What the operations of interventions do to the elements that are selected.

Half precision is widened for sums over many elements, as it would lose digits there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from layertap.errors import InvalidInputError
from layertap.extraction.regions import Selected
from layertap.intervention import Axis, Intervention, Operation

__all__ = ["Change", "computed", "operand_of"]


@dataclass(frozen=True, slots=True)
class Change:
    """One intervention on the part of a value that it selects.

    Attributes:
        one: The intervention.
        found: What it selects.
        old: The selected elements ``[rows, ...]``.
        operand: Its tensor, broadcastable to these; None if it has none.
        blocks: The number of blocks of rows; each has the same items.
    """

    one: Intervention
    found: Selected
    old: torch.Tensor
    operand: torch.Tensor | None
    blocks: int

    @property
    def wide(self) -> torch.Tensor:
        """The selected elements, in at least single precision."""
        return self.old.to(torch.promote_types(self.old.dtype, torch.float32))

    def tensor(self, like: torch.Tensor) -> torch.Tensor:
        """Return the intervention's tensor on the device and in the dtype of another one."""
        if self.operand is None:
            raise AssertionError(f"{self.one.operation.name} has a tensor")
        return self.operand.to(like.device, like.dtype)


def computed(change: Change) -> torch.Tensor:
    """Return the new elements, broadcastable to the selected ones, in any floating-point dtype.

    For all operations but PATCH and SKIP, whose elements come from elsewhere.
    """
    return _OPERATIONS[change.one.operation](change)


def operand_of(one: Intervention, found: Selected) -> torch.Tensor | None:
    """Return the tensor of an intervention as ``[1 or items, ...]``, broadcastable to the part.

    Raises:
        InvalidInputError: If its shape doesn't fit.
    """
    if one.tensor is None:
        return None
    array = one.tensor
    tensor = torch.from_numpy(np.array(array, np.float64 if array.itemsize == 8 else np.float32))
    shape, part = tuple(tensor.shape), found.shape
    channel = found.axes.dims.get(Axis.CHANNEL)
    rank = len(part)
    if len(shape) == 1 and channel is not None and shape[0] == part[channel]:
        return tensor.reshape([1, *(-1 if dim == channel else 1 for dim in range(rank))])
    if not one.operation.takes_direction:
        if not shape:
            return tensor.reshape([1] * (rank + 1))
        if shape == part:
            return tensor.reshape([1, *part])
        if shape == (len(found.items), *part):
            return tensor
    vector = "its layout tells no channels" if channel is None else f"[{part[channel]}]"
    raise InvalidInputError(
        f"intervention {one.name}: tensor: got {list(shape)}, expected one number for each channel "
        f"({vector})"
        + (
            ""
            if one.operation.takes_direction
            else f", a single number, {list(part)}, or {[len(found.items), *part]}"
        )
    )


def _mean(change: Change) -> torch.Tensor:
    mean = change.wide
    dims = sorted(dim + 1 for dim in change.found.over(change.one))
    if dims:
        mean = mean.mean(dims, keepdim=True)
    if Axis.ITEM in change.one.over:
        each = mean.unflatten(0, (change.blocks, -1))
        mean = each.mean(1, keepdim=True).expand_as(each).flatten(0, 1)
    return mean


def _noise(change: Change) -> torch.Tensor:
    # The same for each item, so that an item's result is that of a request with it alone.
    generator = torch.Generator().manual_seed(change.one.seed)
    noise = torch.randn(change.found.shape, generator=generator, dtype=torch.float32)
    return change.old + noise.to(change.old.device, change.old.dtype) * change.one.factor


def _added(change: Change) -> torch.Tensor:
    added = change.tensor(change.wide) * change.one.factor
    return change.old + added.to(change.old.dtype)


def _along(change: Change) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the direction, with a length of 1, and the component along it."""
    wide = change.wide
    given = change.tensor(wide)
    unit = given / torch.linalg.vector_norm(given)
    channel = change.found.axes.dims[Axis.CHANNEL] + 1
    return unit, (wide * unit).sum(channel, keepdim=True)


def _projected_out(change: Change) -> torch.Tensor:
    unit, along = _along(change)
    return change.wide - along * unit


def _projected(change: Change) -> torch.Tensor:
    unit, along = _along(change)
    return along * unit


def _capped(change: Change) -> torch.Tensor:
    unit, along = _along(change)
    capped = along.clamp(change.one.low, change.one.high)
    return torch.where(capped == along, change.wide, change.wide + (capped - along) * unit)


_OPERATIONS: dict[Operation, Callable[[Change], torch.Tensor]] = {
    Operation.ZERO: lambda change: torch.zeros_like(change.old),
    Operation.SET: lambda change: torch.full_like(change.old, change.one.value),
    Operation.MEAN: _mean,
    Operation.SCALE: lambda change: change.old * change.one.factor,
    Operation.ADD: _added,
    Operation.REPLACE: lambda change: change.tensor(change.wide),
    Operation.PROJECT_OUT: _projected_out,
    Operation.PROJECT_KEEP: _projected,
    Operation.CAP: _capped,
    Operation.CLAMP: lambda change: change.old.clamp(change.one.low, change.one.high),
    Operation.NOISE: _noise,
}
