"""Objectives: the number of each item whose gradients a request asks for. Without PyTorch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from numbers import Integral
from typing import Any

import numpy as np

from layertap.errors import InvalidInputError
from layertap.float_arrays import as_array, check_floats
from layertap.selection import Capture
from layertap.whole_numbers import whole_number

__all__ = [
    "MAX_TERMS",
    "IndexLike",
    "Measure",
    "Objective",
    "ObjectiveLike",
    "ObjectiveTerm",
    "TermKey",
    "parse_objective",
]

MAX_TERMS = 16
"""Maximum number of terms of an objective."""


class Measure(StrEnum):
    """How an item's number is made from the item's value; ``layertap.v1.Measure`` has the same."""

    ELEMENT = "element"
    """The element at an index."""
    MAXIMUM = "maximum"
    """The largest element. The reply says which one it was."""
    SUM = "sum"
    MEAN = "mean"
    NORM = "norm"
    """The square root of the sum of all squares."""
    LOG_PROBABILITY = "log_probability"
    """The logarithm of the softmax over the last dimension, at an index or the largest of it."""
    DOT = "dot"
    """The sum of the elements times those of a vector that the caller sends."""

    @property
    def finds(self) -> bool:
        """Whether the reply says which element was used, as the caller may not know it."""
        return self in (Measure.MAXIMUM, Measure.LOG_PROBABILITY)


Place = tuple[int, ...]
"""An index into each of the first dimensions of an item's value."""

IndexLike = int | Place | Sequence[int] | Sequence[Place]
"""One place for all items (an int, or a tuple), or a list with a place for each item."""


@dataclass(frozen=True, slots=True)
class TermKey:
    """What a term has in common with the terms of other requests that the same plan serves.

    Attributes:
        layer: The name of a layer; if empty, the model's own result.
        capture: The side of the layer: OUTPUT or INPUT.
        measure: How the number is made from the item's value.
    """

    layer: str
    capture: Capture
    measure: Measure


@dataclass(frozen=True, slots=True, eq=False)
class ObjectiveTerm:
    """One term of an objective.

    Attributes:
        layer: The name of a layer; if empty, the model's own result.
        measure: How the number is made from the item's value.
        places: Where in an item's value: one place for all items, or one for each item, all of the
            same length; none for the whole value.
        vector: For DOT: an array of a floating-point dtype, of the shape of the item's value, or
            ``[B, ...]`` to have one for each item.
        weight: A factor.
        capture: The side of the layer: OUTPUT or INPUT.

    Raises:
        InvalidInputError: If these contradict each other, or a number is not finite.
    """

    layer: str
    measure: Measure = Measure.ELEMENT
    places: tuple[Place, ...] = ()
    vector: np.ndarray[Any, np.dtype[Any]] | None = None
    weight: float = 1.0
    capture: Capture = Capture.OUTPUT

    def __post_init__(self) -> None:
        if self.capture.is_gradient:
            raise InvalidInputError(
                f"objective: capture: got {self.capture.name}, expected OUTPUT or INPUT"
            )
        if len({len(place) for place in self.places}) > 1:
            raise InvalidInputError("objective: index: got places of several lengths, expected one")
        if not math.isfinite(self.weight):
            raise InvalidInputError(f"objective: weight: got {self.weight}, expected a number")
        if (self.vector is None) == (self.measure is Measure.DOT):
            raise InvalidInputError(
                "objective: vector: expected one for DOT, and none for any other measure"
            )
        if self.vector is not None:
            check_floats(self.vector, "objective: vector")

    @property
    def key(self) -> TermKey:
        """What it has in common with the terms of other requests."""
        return TermKey(self.layer, self.capture, self.measure)


@dataclass(frozen=True, slots=True, eq=False)
class Objective:
    """The number of each item whose gradients a request asks for: a weighted sum of terms.

    The class methods make objectives of one term. ``+``, ``-`` and ``*`` combine them:
    ``Objective.element("fc", 281) - Objective.element("fc", 282)``. Each of them takes the name of
    a layer; ``""`` is the model's own result.

    Attributes:
        terms: The terms, from 1 to 16.

    Raises:
        InvalidInputError: If there are no or too many terms.
    """

    terms: tuple[ObjectiveTerm, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.terms) <= MAX_TERMS:
            raise InvalidInputError(
                f"objective: got {len(self.terms)} terms, expected from 1 to {MAX_TERMS}"
            )

    @classmethod
    def element(cls, layer: str, index: IndexLike) -> Objective:
        """Return the element at an index, such as the score of one class.

        Args:
            layer: The layer.
            index: A number, or a tuple of one number for each dimension of an item; a list of
                numbers or tuples to have one for each item.
        """
        return cls((ObjectiveTerm(layer, Measure.ELEMENT, _places(index)),))

    @classmethod
    def maximum(cls, layer: str, index: IndexLike | None = None) -> Objective:
        """Return the largest element of each item, or of its part at an index.

        The reply has ``objective.index`` ``[B, D]``, the index of that element in the item's D
        dimensions.
        """
        return cls((ObjectiveTerm(layer, Measure.MAXIMUM, _places(index)),))

    @classmethod
    def sum(cls, layer: str, index: IndexLike | None = None) -> Objective:
        """Return the sum of all elements of each item, or of its part at an index."""
        return cls((ObjectiveTerm(layer, Measure.SUM, _places(index)),))

    @classmethod
    def mean(cls, layer: str, index: IndexLike | None = None) -> Objective:
        """Return the mean of all elements of each item, or of its part at an index."""
        return cls((ObjectiveTerm(layer, Measure.MEAN, _places(index)),))

    @classmethod
    def norm(cls, layer: str, index: IndexLike | None = None) -> Objective:
        """Return the square root of the sum of squares of each item, or of its part at an index."""
        return cls((ObjectiveTerm(layer, Measure.NORM, _places(index)),))

    @classmethod
    def log_probability(cls, layer: str, index: IndexLike | None = None) -> Objective:
        """Return the logarithm of the softmax over an item's last dimension.

        It is that of the element at the index, or of the most probable element of those that the
        index leads to. The reply has ``objective.index`` as for ``maximum``.
        """
        return cls((ObjectiveTerm(layer, Measure.LOG_PROBABILITY, _places(index)),))

    @classmethod
    def dot(cls, layer: str, vector: Any, index: IndexLike | None = None) -> Objective:
        """Return the sum of an item's elements times those of a vector: a vector-Jacobian product.

        Args:
            layer: The layer.
            vector: A numpy array or a torch tensor of a floating-point dtype, of the shape of an
                item's value, or of its part at the index; or ``[B, ...]`` for one per item.
            index: Where the part is; None for the whole value.
        """
        return cls((ObjectiveTerm(layer, Measure.DOT, _places(index), as_array(vector)),))

    def __add__(self, other: Objective) -> Objective:
        """Return the sum of two objectives."""
        return Objective((*self.terms, *other.terms))

    def __sub__(self, other: Objective) -> Objective:
        """Return the difference of two objectives."""
        return self + other * -1.0

    def __mul__(self, factor: float) -> Objective:
        """Return the objective times a number."""
        return Objective(tuple(replace(each, weight=each.weight * factor) for each in self.terms))

    __rmul__ = __mul__

    def of_input(self) -> Objective:
        """Return the objective made from what its layers were given instead of what they return."""
        return Objective(tuple(replace(each, capture=Capture.INPUT) for each in self.terms))

    @property
    def keys(self) -> tuple[TermKey, ...]:
        """What its terms have in common with those of other requests."""
        return tuple(term.key for term in self.terms)

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Read terms such as ``fc[281]``, ``fc[0,5]``, ``fc[maximum]`` or ``fc[281] - fc[282]``.

        What is in a term's last brackets is a place, or a measure, or a measure and a place:
        ``fc[log_probability 281]``. ``argmax`` is another word for ``maximum``. The layer before
        the brackets may be left out for the model's own result, and a term may begin with a
        factor: ``0.5*fc[mean]``. There are spaces around ``+`` and ``-``.
        """
        parts = re.split(r"\s([+-])\s", text.strip())
        objective = _term(parts[0])
        for sign, part in zip(parts[1::2], parts[2::2], strict=True):
            objective = objective + _term(part) * (-1.0 if sign == "-" else 1.0)
        return objective


ObjectiveLike = Objective | str
"""An objective, or the text of one; see ``Objective.parse``."""


def parse_objective(given: ObjectiveLike | None) -> Objective | None:
    """Convert a caller's objective; see ``Objective.parse`` for errors."""
    return Objective.parse(given) if isinstance(given, str) else given


_TERM = re.compile(r"(?:(?P<weight>[0-9.eE+-]+)\*)?(?P<layer>.*)\[(?P<inside>[^\[\]]*)\]")
_PLACE = re.compile(r"-?\d{1,18}(?:\s*,\s*-?\d{1,18})*")


def _term(text: str) -> Objective:
    found = _TERM.fullmatch(text.strip())
    if found is None:
        raise InvalidInputError(
            f"objective: got {text.strip()!r}, expected LAYER[INDEX] or LAYER[MEASURE]"
        )
    word, _, rest = found["inside"].strip().partition(" ")
    if _PLACE.fullmatch(found["inside"].strip()):
        word, rest = "element", found["inside"]
    word = {"argmax": "maximum"}.get(word, word)
    known = [measure for measure in Measure if measure is not Measure.DOT]
    if word not in known or (rest.strip() and not _PLACE.fullmatch(rest.strip())):
        raise InvalidInputError(
            f"objective: got {found['inside']!r} in brackets, expected an index such as 281 or "
            f"0,5, or one of {', '.join(known)}, or both"
        )
    place = tuple(int(each) for each in rest.split(",")) if rest.strip() else None
    term = ObjectiveTerm(found["layer"], Measure(word), _places(place))
    try:
        weight = float(found["weight"] or 1.0)
    except ValueError:
        raise InvalidInputError(f"objective: got {found['weight']!r} as a factor") from None
    return Objective((replace(term, weight=weight),))


def _places(index: IndexLike | None) -> tuple[Place, ...]:
    if index is None:
        return ()
    if isinstance(index, Integral):
        return ((_whole(index),),)
    if isinstance(index, tuple):
        return (_place(index),)
    places: Any = np.asarray(index).tolist() if hasattr(index, "shape") else index
    return tuple(map(_place, places))


def _place(given: Any) -> Place:
    return (_whole(given),) if isinstance(given, Integral) else tuple(map(_whole, given))


def _whole(given: Any) -> int:
    return whole_number(given, "objective: index")
