"""How the tensors of a reply are made from captured values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from layertap.engine.resolve import Output
from layertap.errors import InvalidInputError
from layertap.extraction.attribution import eigen_cam
from layertap.extraction.layout import Geometry, Layout
from layertap.extraction.map_forms import shaped_map
from layertap.extraction.masked import Tokens
from layertap.extraction.points import Dim, ValueSpec
from layertap.extraction.projecting import Matrix, projected
from layertap.extraction.reductions import Reduced, chained, reduced
from layertap.extraction.regridding import regridded
from layertap.models import BatchKey
from layertap.regrid import NO_REGRID, Regrid
from layertap.selection import MapForm, Reduction

__all__ = ["Made", "Making", "Needed", "made_of"]

Specs = Mapping[int, ValueSpec] | Sequence[ValueSpec]
"""The dtype and shape of each captured value, by the index of its point."""


@dataclass(frozen=True, slots=True)
class Needed:
    """Data of a request that the making of its outputs needs.

    Attributes:
        key: The shapes of the items of its batch.
        tokens: Which positions of its texts count, for reductions; None if all do.
        pictures: The images that the model is given, for overlays; None if there are none.
        matrices: What its projections multiply by.
    """

    key: BatchKey
    tokens: Tokens | None = None
    pictures: torch.Tensor | None = None
    matrices: Sequence[Matrix] = ()


@dataclass(frozen=True, slots=True)
class Made:
    """How one tensor of a reply is made.

    Attributes:
        members: What is made of the value of each of its layers.
        whole: The dtype and shape of these, one after the other along the channels.
        last: What is made of the whole; None for nothing.
    """

    members: Sequence[Reduced]
    whole: ValueSpec
    last: Reduced | None = None

    @property
    def spec(self) -> ValueSpec:
        """The dtype and shape of the tensor."""
        return self.whole if self.last is None else self.last.spec

    def scratch_bytes(self, size: int) -> int:
        """Return the bytes that the making takes for a batch, beside the tensor itself.

        They are those of the whole before the projection, or of the layers before they are one. A
        single layer that is only reduced needs none to speak of.
        """
        if len(self.members) == 1 and self.last is None:
            return 0
        return math.prod(self.whole.shape(size)) * self.whole.dtype.itemsize


def made_of(output: Output, specs: Specs, needed: Needed) -> Made:
    """Return how an output is made.

    Args:
        output: The output.
        specs: The dtype and shape of the values that are captured.
        needed: Data of the request.

    Raises:
        InvalidInputError: If a reduction, method, form of a map, grid, concatenation or projection
            can't be made of the values.
    """
    alone = len(output.members) == 1
    regrids = [output.regrid] if alone else _concatenated(output, specs, needed.key)
    members = [
        _member(output, specs[member.point], member.layer, regrid, needed)
        for member, regrid in zip(output.members, regrids, strict=True)
    ]
    whole = _joined(output, members) if len(members) > 1 else members[0].spec
    if output.projection is None:
        return Made(members, whole)
    matrix = needed.matrices[output.projection.number]
    ragged = output.reduction.ragged
    return Made(members, whole, projected(whole, matrix, output.layer, ragged=ragged))


def _concatenated(output: Output, specs: Specs, key: BatchKey) -> list[Regrid]:
    """Return what is done to the grid of each layer of a concatenation.

    Where no size is given, all get the grid of the first one. Values that have no grid any more,
    or never had one, are left as they are.
    """
    first = output.members[0]
    keeps_grid = output.reduction in (Reduction.NONE, Reduction.TOKEN_GRID)
    flat = all(len(specs[member.point].dims) == 2 for member in output.members)
    if output.regrid.size is not None or flat or not keeps_grid:
        return [output.regrid] * len(output.members)
    made = regridded(specs[first.point], output.regrid, first.layer, key, output.regridded).spec
    size = made.dims[2].size, made.dims[3].size
    return [replace(output.regrid, size=size)] * len(output.members)


def _member(output: Output, spec: ValueSpec, layer: str, regrid: Regrid, needed: Needed) -> Reduced:
    key = needed.key
    steps: list[Reduced] = []
    if not output.method.takes_gradient:
        steps.append(eigen_cam(spec, layer, key))
    if output.map_form is not MapForm.GRID:
        last = steps[-1].spec if steps else spec
        steps.append(shaped_map(output.map_form, last, layer, key, needed.pictures))
    if regrid != NO_REGRID:
        last = steps[-1].spec if steps else spec
        steps.append(regridded(last, regrid, layer, key, output.regridded))
    last = steps[-1].spec if steps else spec
    steps.append(reduced(last, output.reduction, layer, key, needed.tokens))
    return chained(steps)


def _joined(output: Output, members: Sequence[Reduced]) -> ValueSpec:
    """Return the spec of a concatenation along the second dimension."""
    first = members[0].spec
    dtype = first.dtype
    for (layer, _), member in zip(output.members, members, strict=True):
        dims = member.spec.dims
        front = bool(dims) and (dims[0].batch or output.reduction.ragged)
        alike = len(dims) == len(first.dims) and all(
            dim.at(1) == other.at(1)
            for axis, (dim, other) in enumerate(zip(dims, first.dims, strict=True))
            if axis != 1
        )
        if not front or not alike or len(dims) not in (2, 4) or member.spec.dynamic:
            raise InvalidInputError(
                f"concat: takes values [B, C], or grids that are brought to [B, C, H, W], but "
                f"layer {layer!r} is {list(member.spec.shape(1))} for one item, and "
                f"{output.members[0].layer!r} is {list(first.shape(1))}"
            )
        dtype = torch.promote_types(dtype, member.spec.dtype)
    channels = sum(member.spec.dims[1].size for member in members)
    dims = (first.dims[0], Dim(channels), *first.dims[2:])
    geometry = Geometry()
    if len(dims) == 4:
        geometry = Geometry(Layout.CHANNELS_FIRST, channels, dims[2].size, dims[3].size)
    return ValueSpec(dtype, dims, geometry=geometry)


@dataclass(eq=False, slots=True)
class Making:
    """One reply's tensors on their way: those that are made of several layers wait for the last.

    Attributes:
        made: How each tensor is made.
        size: The number of items in the batch.
    """

    made: Sequence[Made]
    size: int
    _wholes: dict[int, torch.Tensor] = field(default_factory=dict)
    _there: dict[int, set[int]] = field(default_factory=dict)

    def take(self, slot: int, member: int, value: torch.Tensor) -> torch.Tensor | None:
        """Return a tensor of the reply if a captured value completes it; else None.

        The result may be a view of the value. A pass that failed may be run again: what it left is
        replaced.

        Args:
            slot: The index of the tensor.
            member: Which of its layers the value is from.
            value: The value; it is copied if the tensor is not complete.
        """
        made = self.made[slot]
        part = made.members[member].apply(value)
        if len(made.members) > 1:
            whole = self._collected(slot, member, part)
            if whole is None:
                return None
            part = whole
        return part if made.last is None else made.last.apply(part)

    def _collected(self, slot: int, member: int, part: torch.Tensor) -> torch.Tensor | None:
        made = self.made[slot]
        if slot not in self._wholes:
            self._wholes[slot] = torch.empty(
                made.whole.shape(self.size), dtype=made.whole.dtype, device=part.device
            )
        begin = sum(each.spec.dims[1].size for each in made.members[:member])
        own = self._wholes[slot].narrow(1, begin, made.members[member].spec.dims[1].size)
        own.copy_(part.detach())
        there = self._there.setdefault(slot, set())
        there.add(member)
        if len(there) < len(made.members):
            return None
        del self._there[slot]
        return self._wholes.pop(slot)
