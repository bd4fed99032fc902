"""What interventions must do, by hand in plain PyTorch: the reference of ``prove_interventions``.

Values are changed by forward hooks on a fresh module that layertap has never seen
(``gradient_truths.changed``). Which dimension of a value is which is given by the author of a
case, not read from layertap's catalogue.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from gradient_truths import Change, Place, Run, changed
from torch import nn

__all__ = [
    "Done",
    "Edit",
    "Part",
    "Pass",
    "add",
    "cap",
    "clamp",
    "mean",
    "noise",
    "norm",
    "project_keep",
    "project_out",
    "replace",
    "run",
    "same_bits",
    "scale",
    "set_to",
]


class Part(NamedTuple):
    """A part of a value: the product of indices along some of its dimensions.

    Attributes:
        items: The dimension of the batch's items; None if the value is that of the only item.
        indices: The indices along other dimensions of the value, ascending.
        rows: The items, in ascending order; None for all.
    """

    items: int | None
    indices: Mapping[int, Sequence[int]] = {}
    rows: Sequence[int] | None = None

    def read(self, value: torch.Tensor) -> torch.Tensor:
        """Return a copy of the part."""
        for dim, indices in self._all().items():
            value = value.index_select(dim, torch.tensor(list(indices)))
        return value.clone()

    def written(self, value: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Return a copy of the value, in its memory format, with new elements in the part."""
        mask = torch.ones(value.shape, dtype=torch.bool)
        for dim, indices in self._all().items():
            along = torch.zeros(value.shape[dim], dtype=torch.bool)
            along[list(indices)] = True
            mask &= along.reshape([-1 if each == dim else 1 for each in range(value.dim())])
        copy = value.clone()
        copy[mask] = new.flatten()
        return copy

    def _all(self) -> dict[int, Sequence[int]]:
        rows = {} if self.items is None or self.rows is None else {self.items: self.rows}
        return {**self.indices, **rows}


class Done(NamedTuple):
    """What a change did to a part.

    Attributes:
        elements: The elements of the part.
        changed: How many have another value.
        norms: The part's norm before and after.
    """

    elements: int
    changed: int
    norms: tuple[float, float]

    @classmethod
    def of(cls, old: torch.Tensor, new: torch.Tensor) -> Done:
        """Compare a part with what became of it."""
        both = torch.isnan(old) & torch.isnan(new)
        return cls(old.numel(), int(((old != new) & ~both).sum()), (norm(old), norm(new)))


def norm(value: torch.Tensor) -> float:
    """Return the Euclidean norm, computed in float64."""
    return float(value.double().square().sum().sqrt())


class Pass:
    """A pass of a fresh module with hooks.

    Attributes:
        values: The watched values, as they are after their change.
        done: What each change did.
    """

    def __init__(self) -> None:
        self.values: dict[Place, torch.Tensor] = {}
        self.done: dict[Place, Done] = {}


class Edit(NamedTuple):
    """A change of a part of a value.

    Attributes:
        part: The part.
        change: Makes the new elements of the old ones; one of the next two in place of it.
        source: The part of the same value that takes its place.
        skips: Whether the same part of what the module was given first takes its place.
    """

    part: Part
    change: Change | None = None
    source: Part | None = None
    skips: bool = False

    def new(self, value: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
        """Return the new elements of the part."""
        if self.skips:
            assert given is not None
            return self.part.read(given)
        if self.source is not None:
            return self.source.read(value)
        assert self.change is not None
        return self.change(self.part.read(value))


def run(
    net: nn.Module, run_net: Run, watched: Collection[Place], edits: Mapping[Place, Edit]
) -> Pass:
    """Run a fresh module; change some of its values, and keep copies of others.

    Args:
        net: The module.
        run_net: Runs it on its batch.
        watched: The values to keep.
        edits: The change of each value.
    """
    kept = Pass()
    given: dict[tuple[str, int], torch.Tensor] = {}
    # The only argument, or the first of several.
    skipped = {
        Place(place.path, "input", place.call, member)
        for place, edit in edits.items()
        if edit.skips
        for member in ((), ("0",))
    }

    def at(place: Place) -> Change:
        def hook(value: torch.Tensor) -> torch.Tensor:
            if place in skipped:
                given[place.path, place.call] = value.clone()
            if place in edits:
                edit = edits[place]
                old = edit.part.read(value)
                new = (
                    edit.new(value, given.get((place.path, place.call)))
                    .expand_as(old)
                    .to(old.dtype)
                )
                kept.done[place] = Done.of(old, new)
                value = edit.part.written(value, new)
            if place in watched:
                kept.values[place] = value.clone()
            return value

        return hook

    with torch.no_grad():
        changed(net, run_net, {place: at(place) for place in {*watched, *edits, *skipped}})
    return kept


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same shape, dtype and bits, NaN and -0 included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    both = (each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(*both)


def set_to(number: float) -> Change:
    return lambda part: torch.full_like(part, number)


def scale(factor: float) -> Change:
    return lambda part: part * factor


def clamp(low: float, high: float) -> Change:
    # As a comparison of each element: torch.clamp is what layertap uses.
    return lambda part: torch.where(part < low, low, torch.where(part > high, high, part))


def add(what: torch.Tensor, factor: float) -> Change:
    return lambda part: part + what.to(part.dtype) * factor


def replace(what: torch.Tensor) -> Change:
    return lambda part: what.to(part.dtype)


def mean(dims: Sequence[int]) -> Change:
    def change(part: torch.Tensor) -> torch.Tensor:
        count = 1
        for dim in dims:
            count *= part.shape[dim]
        return part.double().sum(list(dims), keepdim=True) / count

    return change


def noise(items: int | None, sigma: float, seed: int) -> Change:
    """Add the same noise to each item, drawn in the order of the dimensions of an item."""

    def change(part: torch.Tensor) -> torch.Tensor:
        shape = [size for dim, size in enumerate(part.shape) if dim != items]
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        drawn = drawn if items is None else drawn.unsqueeze(items)
        return part + drawn.to(part.dtype) * sigma

    return change


def _component(part: torch.Tensor, direction: torch.Tensor, dim: int) -> tuple[Any, Any]:
    unit = direction.double() / direction.double().square().sum().sqrt()
    unit = unit.reshape([-1 if each == dim else 1 for each in range(part.dim())])
    return unit, (part.double() * unit).sum(dim, keepdim=True)


def project_out(direction: torch.Tensor, dim: int) -> Change:
    def change(part: torch.Tensor) -> torch.Tensor:
        unit, along = _component(part, direction, dim)
        return part.double() - along * unit

    return change


def project_keep(direction: torch.Tensor, dim: int) -> Change:
    def change(part: torch.Tensor) -> torch.Tensor:
        unit, along = _component(part, direction, dim)
        return along * unit

    return change


def cap(direction: torch.Tensor, dim: int, low: float, high: float) -> Change:
    def change(part: torch.Tensor) -> torch.Tensor:
        unit, along = _component(part, direction, dim)
        return part.double() + (along.clamp(low, high) - along) * unit

    return change
