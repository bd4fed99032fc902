"""The numbers that a request gives for its objective, checked and ready to compute with.

An item's number is made from the item's part of one value, or of several. ``ItemAxis`` says which
part that is, and ``Operands.measure`` makes the number, in a way that autograd can follow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from layertap.errors import InvalidInputError
from layertap.extraction.points import ValueSpec
from layertap.objective import Measure, ObjectiveTerm

__all__ = ["ItemAxis", "Measured", "Operands", "check_range"]


class ItemAxis(NamedTuple):
    """Where the items of a batch are in a value.

    Attributes:
        axis: The dimension that grows with the batch; None if there is none, so that the whole
            value belongs to the only item.
        per_item: The elements of an item along it.
    """

    axis: int | None
    per_item: int = 1

    @classmethod
    def of(cls, spec: ValueSpec) -> ItemAxis:
        """Return where the items are in values of a type and shape."""
        found = None if spec.dynamic else spec.batch_axis
        return cls(None) if found is None else cls(*found)

    def items(self, value: torch.Tensor, size: int) -> torch.Tensor:
        """Return a value as ``[size, ...]``: the parts of its items, as a view if possible."""
        if self.axis is None:
            if size != 1:
                raise ValueError("a value without a batch dimension belongs to one item")
            return value.unsqueeze(0)
        first = value.movedim(self.axis, 0)
        if self.per_item == 1:
            return first
        return first.reshape(size, self.per_item, *first.shape[1:])

    def joined(self, items: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Return the value whose parts are ``items``: the inverse of the method of that name.

        Args:
            items: The parts, ``[size, ...]``.
            shape: The shape of the value.
        """
        if self.axis is None:
            return items.squeeze(0)
        merged = items.flatten(0, 1) if self.per_item != 1 else items
        return merged.movedim(0, self.axis).reshape(shape)

    def shape_per_item(self, spec: ValueSpec) -> tuple[int, ...]:
        """Return the shape of an item's part, as a spec predicts it."""
        shape = list(spec.shape(1))
        if self.axis is None:
            return tuple(shape)
        first = shape.pop(self.axis)
        return (first, *shape) if self.per_item != 1 else tuple(shape)


class Measured(NamedTuple):
    """The numbers of one term.

    Attributes:
        numbers: The number of each item, ``[B]``.
        places: The index of the element that each number is, ``[B, D]`` int64; None if the measure
            is not that of one element.
    """

    numbers: torch.Tensor
    places: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Operands:
    """The numbers of a request's objective.

    Attributes:
        terms: The terms, in the order of the plan's ``ObjectiveSpec``.
        baselines: The baselines of integrated gradients that are tensors; None in the trial of a
            plan, where zeros take their place.
        item: The item that these operands are of; None if they are of a whole batch.
    """

    terms: tuple[ObjectiveTerm, ...]
    baselines: tuple[np.ndarray[Any, np.dtype[Any]], ...] | None = ()
    item: int | None = None

    @classmethod
    def example(cls, measures: Sequence[Measure], shapes: Sequence[tuple[int, ...]]) -> Operands:
        """Return operands for trying a plan: first elements, and vectors of ones.

        Args:
            measures: The measure of each term.
            shapes: The shape of an item's part of each term's value.
        """
        return cls(
            tuple(
                ObjectiveTerm(
                    "",
                    measure,
                    ((0,) * len(shape),) if measure is Measure.ELEMENT else (),
                    np.ones(shape, np.float32) if measure is Measure.DOT else None,
                )
                for measure, shape in zip(measures, shapes, strict=True)
            ),
            baselines=None,
        )

    def check(self, shapes: Sequence[tuple[int, ...]], size: int) -> None:
        """Check the operands against the values that they are for.

        Args:
            shapes: The shape of an item's part of each term's value.
            size: The number of items.

        Raises:
            InvalidInputError: If an index or a vector doesn't fit.
        """
        for term, shape in zip(self.terms, shapes, strict=True):
            _check_places(term, shape, size)
            _check_vector(term, shape, size)

    def check_range(self, dtypes: Sequence[torch.dtype]) -> None:
        """Check that the dtypes of the objective's values can hold the operands.

        Args:
            dtypes: The dtype of each term's value.

        Raises:
            InvalidInputError: If a weight or an element of a vector would be infinite in it.
        """
        for term, dtype in zip(self.terms, dtypes, strict=True):
            check_range("objective: weight", abs(term.weight), dtype)
            if term.vector is not None and term.vector.size:
                largest = float(np.abs(term.vector.astype(np.float64)).max())
                check_range("objective: vector", largest, dtype)

    def narrow(self, item: int, shapes: Sequence[tuple[int, ...]]) -> Operands:
        """Return the operands of one item; see ``check`` for the shapes."""
        terms = tuple(
            _of_item(term, item, len(shape)) for term, shape in zip(self.terms, shapes, strict=True)
        )
        return Operands(terms, self.baselines, item)

    def fixed(self, found: Sequence[torch.Tensor | None]) -> Operands:
        """Return operands in which each element that a measure looked for is a given one.

        Args:
            found: For each term the index of the elements, or None; see `Measured`.
        """
        terms = tuple(
            _at(term, places) if places is not None and term.measure.finds else term
            for term, places in zip(self.terms, found, strict=True)
        )
        return replace(self, terms=terms)

    def repeated(self, times: int, shapes: Sequence[tuple[int, ...]]) -> Operands:
        """Return the operands of a batch that has all items several times, one after the other."""
        terms = tuple(
            _repeated(term, times, len(shape))
            for term, shape in zip(self.terms, shapes, strict=True)
        )
        return replace(self, terms=terms)

    def baseline(self, number: int, shape: tuple[int, ...], size: int) -> torch.Tensor:
        """Return a baseline of the request.

        Args:
            number: Which of its baselines.
            shape: The shape of an item's value.
            size: The number of items; not used for the operands of one item.

        Returns:
            The baseline ``[1, ...]`` for all items, or ``[B, ...]`` with one for each.

        Raises:
            InvalidInputError: If its shape is another one.
        """
        if self.baselines is None:
            return torch.zeros(1, *shape)
        array = self.baselines[number]
        each = array.ndim == len(shape) + 1
        count = array.shape[0] if each and self.item is not None else size
        missing = each and self.item is not None and self.item >= count
        if missing or array.shape not in (shape, (count, *shape)):
            raise InvalidInputError(
                f"sweep: baseline: got {list(array.shape)}, expected {list(shape)} for all items "
                f"or {[size, *shape]}"
            )
        base = _floats(array)
        if not each:
            return base.unsqueeze(0)
        return base if self.item is None else base[self.item : self.item + 1]

    def measure(self, term: int, items: torch.Tensor) -> Measured:
        """Make each item's number.

        Args:
            term: The index of the term.
            items: The value, ``[B, ...]``.

        Returns:
            The numbers without the term's weight.

        Raises:
            InvalidInputError: If the operands don't fit the value.
        """
        mine = self.terms[term]
        shape, size = tuple(items.shape[1:]), items.shape[0]
        _check_places(mine, shape, size)
        _check_vector(mine, shape, size)
        if mine.measure is Measure.LOG_PROBABILITY:
            items = items.log_softmax(-1)
        places = torch.tensor(mine.places, dtype=torch.int64, device=items.device)
        part = items
        if mine.places and places.shape[1]:
            places = places % torch.tensor(shape[: places.shape[1]], device=items.device)
            places = places.expand(size, -1)
            part = items[(torch.arange(size, device=items.device), *places.unbind(1))]
        flat = part.reshape(size, -1)
        match mine.measure:
            case Measure.ELEMENT:
                return Measured(flat[:, 0], places if mine.places else _no_place(items))
            case Measure.SUM:
                return Measured(flat.sum(1), None)
            case Measure.MEAN:
                return Measured(flat.mean(1), None)
            case Measure.NORM:
                return Measured(torch.linalg.vector_norm(flat, dim=1), None)
            case Measure.DOT:
                vector = _tensor(mine).to(items.device, items.dtype)
                return Measured((flat * vector.reshape(-1, flat.shape[1])).sum(1), None)
            case Measure.MAXIMUM | Measure.LOG_PROBABILITY:
                best = flat.detach().argmax(1)
                inside = (
                    torch.stack(torch.unravel_index(best, part.shape[1:]), 1)
                    if (part.dim() > 1)
                    else _no_place(items)
                )
                index = torch.cat([places, inside], 1) if mine.places else inside
                return Measured(flat.gather(1, best[:, None])[:, 0], index)


def check_range(what: str, largest: float, dtype: torch.dtype) -> None:
    """Check that a dtype can hold numbers.

    Args:
        what: What they are, for the error message.
        largest: Their largest magnitude.
        dtype: The dtype.

    Raises:
        InvalidInputError: If it can't.
    """
    limit = torch.finfo(dtype).max
    if largest > limit:
        name = str(dtype).removeprefix("torch.")
        raise InvalidInputError(
            f"{what}: got a magnitude of {largest:g}, expected at most {limit:g}, the largest "
            f"number of the layer's dtype {name}"
        )


def _no_place(items: torch.Tensor) -> torch.Tensor:
    return torch.zeros(items.shape[0], 0, dtype=torch.int64, device=items.device)


def _tensor(term: ObjectiveTerm) -> torch.Tensor:
    if term.vector is None:
        raise AssertionError("a term of DOT has a vector")
    return _floats(term.vector)


def _floats(array: np.ndarray[Any, np.dtype[Any]]) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float64 if array.itemsize == 8 else np.float32))


def _of_item(term: ObjectiveTerm, item: int, rank: int) -> ObjectiveTerm:
    places, vector = term.places, term.vector
    part_rank = rank - (len(places[0]) if places else 0)
    if len(places) > 1:
        places = places[item : item + 1]
    if vector is not None and vector.ndim > part_rank:
        vector = vector[item]
    return ObjectiveTerm(term.layer, term.measure, places, vector, term.weight, term.capture)


def _at(term: ObjectiveTerm, places: torch.Tensor) -> ObjectiveTerm:
    measure = Measure.ELEMENT if term.measure is Measure.MAXIMUM else term.measure
    return replace(term, measure=measure, places=tuple(map(tuple, places.tolist())))


def _repeated(term: ObjectiveTerm, times: int, rank: int) -> ObjectiveTerm:
    places, vector = term.places, term.vector
    part_rank = rank - (len(places[0]) if places else 0)
    if vector is not None and vector.ndim > part_rank:
        vector = np.concatenate([vector] * times)
    return replace(term, places=places * times if len(places) > 1 else places, vector=vector)


def _check_places(term: ObjectiveTerm, shape: tuple[int, ...], size: int) -> None:
    places = term.places
    what = f"objective: index: of {term.measure.name} of layer {term.layer or 'the result'!r}"
    if len(places) not in (0, 1, size):
        raise InvalidInputError(
            f"{what}: got {len(places)} places, expected one, or one for each of {size} items"
        )
    length = len(places[0]) if places else 0
    if length > len(shape) or (term.measure is Measure.ELEMENT and length != len(shape)):
        expected = "" if term.measure is Measure.ELEMENT else "at most "
        raise InvalidInputError(
            f"{what}: got {length} numbers for a place, expected {expected}{len(shape)}, as an "
            f"item's value is {list(shape)}"
        )
    for place in places:
        for number, count in zip(place, shape, strict=False):
            if not -count <= number < count:
                raise InvalidInputError(
                    f"{what}: got {number}, expected from {-count} to {count - 1}, as an item's "
                    f"value is {list(shape)}"
                )
    if term.measure is Measure.LOG_PROBABILITY and not shape:
        raise InvalidInputError(f"{what}: got a single number for an item, expected scores")
    if not math.prod(shape[length:]):
        raise InvalidInputError(f"{what}: an item's value is {list(shape)}, which has no elements")


def _check_vector(term: ObjectiveTerm, shape: tuple[int, ...], size: int) -> None:
    if term.vector is None:
        return
    part = shape[len(term.places[0]) if term.places else 0 :]
    if term.vector.shape not in (part, (size, *part)):
        raise InvalidInputError(
            f"objective: vector: got {list(term.vector.shape)}, expected {list(part)} for all "
            f"items or {[size, *part]}"
        )
