"""The part of a value that an intervention changes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from numbers import Integral
from typing import Any, TypedDict

from layertap.errors import InvalidInputError
from layertap.whole_numbers import whole_number

__all__ = ["NAMED_AXES", "Axis", "Part", "Span", "Where", "axis_of", "parts_of", "read_indexes"]


class Axis(StrEnum):
    """A named dimension of a layer's value; ``layertap.v1.Axis`` has the same names.

    Which dimension it is comes from the layer's layout in the catalogue.
    """

    ITEM = "item"
    """The items of the batch."""
    CHANNEL = "channel"
    TOKEN = "token"
    """The positions of a text or series; or a vision transformer's tokens, class token first."""
    HEAD = "head"
    """The channels in equal parts, one for each head; or the heads of attention weights."""
    Y = "y"
    """The rows of an image's grid; of a vision transformer, those of its patches."""
    X = "x"
    """The columns of that grid."""
    DIMENSION = "dimension"
    """A dimension by its number, for layers whose layout is not known."""


NAMED_AXES = tuple(axis.value for axis in Axis if axis is not Axis.DIMENSION)


@dataclass(frozen=True, slots=True)
class Span:
    """Indices from ``begin`` to before ``end``; negative ones count from the end.

    Attributes:
        begin: The first index.
        end: The index after the last one; None for the end of the dimension.
        step: The distance between them, from 1.
    """

    begin: int = 0
    end: int | None = None
    step: int = 1

    def __post_init__(self) -> None:
        if self.step < 1:
            raise InvalidInputError(f"select: step: got {self.step}, expected from 1")

    def __str__(self) -> str:
        end = "" if self.end is None else self.end
        return f"{self.begin}..{end}" + (f"..{self.step}" if self.step > 1 else "")

    def indices(self, size: int) -> range:
        """Return the indices in a dimension of a size.

        Raises:
            InvalidInputError: If it goes beyond the dimension, or selects nothing.
        """
        end = size if self.end is None else self.end
        for number in (self.begin, end):
            if not -size <= number <= size:
                raise InvalidInputError(f"got {number}, expected from {-size} to {size}")
        found = range(size)[slice(self.begin, end, self.step)]
        if not found:
            raise InvalidInputError(f"got the range {self.begin}..{end}, which selects nothing")
        return found


IndexesLike = int | range | slice | Span | Sequence["int | range | slice | Span"]
"""One index, a range of indices, or a list of both."""


class Where(TypedDict, total=False):
    """The part of a value that an intervention changes: the product of what each axis selects.

    Attributes:
        item: Items of the batch.
        channel: Channels.
        token: Tokens.
        head: Attention heads, of layers whose channels belong to ``heads`` heads.
        y: Rows of the grid.
        x: Columns of the grid.
        dims: Dimensions by number: 0 is the first dimension of an item's value.
        heads: Into how many heads the channels are divided.
    """

    item: IndexesLike
    channel: IndexesLike
    token: IndexesLike
    head: IndexesLike
    y: IndexesLike
    x: IndexesLike
    dims: Mapping[int, IndexesLike]
    heads: int


@dataclass(frozen=True, slots=True)
class Part:
    """What is selected along one axis.

    Attributes:
        axis: The axis.
        indexes: Indices and ranges; negative numbers count from the end.
        dimension: For DIMENSION: its number, 0 for the first dimension of an item's value.
        heads: For HEAD: into how many equal parts the channels are divided; 0 for attention
            weights, which have a dimension of heads.

    Raises:
        InvalidInputError: If nothing is selected, or a number is out of its range.
    """

    axis: Axis
    indexes: tuple[int | Span, ...]
    dimension: int = 0
    heads: int = 0

    def __post_init__(self) -> None:
        if not self.indexes:
            raise InvalidInputError(f"select: {self.axis}: got no index, expected at least one")
        if self.dimension and self.axis is not Axis.DIMENSION:
            raise InvalidInputError(f"select: dimension: got one for the axis {self.axis.name}")
        if not 0 <= self.dimension < 32:
            raise InvalidInputError(f"select: dimension: got {self.dimension}, expected 0 to 31")
        if self.heads and self.axis is not Axis.HEAD:
            raise InvalidInputError(
                f"select: heads: got {self.heads} for the axis {self.axis.name}"
            )
        if not 0 <= self.heads < 1 << 31:
            raise InvalidInputError(
                f"select: heads: got {self.heads}, expected from 0 to 2**31 - 1"
            )

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"dim{self.dimension}" if self.axis is Axis.DIMENSION else self.axis.value

    @property
    def text(self) -> str:
        """It in the form of ``Intervention.parse``, such as ``channel=3,8..16``."""
        indexes = ",".join(map(str, self.indexes))
        return f"{self.name}={indexes}" + (f":heads={self.heads}" if self.heads else "")

    def indices(self, size: int) -> list[int]:
        """Return the selected indices in a dimension of a size.

        Raises:
            InvalidInputError: If one is out of range, or selected twice.
        """
        found: list[int] = []
        try:
            for each in self.indexes:
                if isinstance(each, Span):
                    found.extend(each.indices(size))
                elif -size <= each < size:
                    found.append(each % size)
                else:
                    raise InvalidInputError(f"got {each}, expected from {-size} to {size - 1}")
                if len(found) > size:
                    raise InvalidInputError("got an index twice")
        except InvalidInputError as error:
            raise InvalidInputError(
                f"select: {self.name}: {error}, as its size is {size}"
            ) from None
        if len(set(found)) < len(found):
            raise InvalidInputError(f"select: {self.name}: got an index twice, expected each once")
        return found


_INDEX = re.compile(r"-?\d{1,18}")

_SPAN = re.compile(r"(-?\d{1,18})?\.\.(-?\d{1,18})?(?:\.\.(\d{1,18}))?")


def parts_of(where: Where) -> tuple[Part, ...]:
    """Return what is selected along each axis.

    Raises:
        InvalidInputError: If that contradicts itself, or is not about axes.
    """
    given: dict[str, Any] = dict(where)
    dims, heads = given.pop("dims", {}), given.pop("heads", 0)
    unknown = given.keys() - set(NAMED_AXES)
    if unknown:
        raise InvalidInputError(
            f"select: got {min(unknown)!r}, expected one of {', '.join(NAMED_AXES)}, dims or heads"
        )
    if heads and "head" not in given:
        raise InvalidInputError("select: heads: got a number of heads, but no head is selected")
    return (
        *(
            Part(Axis(name), _indexes(each), heads=_whole(heads) if name == Axis.HEAD else 0)
            for name, each in given.items()
        ),
        *(Part(Axis.DIMENSION, _indexes(each), _whole(dim)) for dim, each in dims.items()),
    )


def _indexes(given: Any) -> tuple[int | Span, ...]:
    if isinstance(given, Integral | range | slice | Span):
        return (_index(given),)
    if isinstance(given, str):
        return read_indexes(given)
    members = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(members, Sequence):
        raise InvalidInputError(f"select: got {members!r}, expected indices and ranges")
    return tuple(map(_index, members))


def read_indexes(text: str) -> tuple[int | Span, ...]:
    """Return the indices and ranges of a text such as ``3,8..16``.

    Raises:
        InvalidInputError: If it can't be read.
    """
    found: list[int | Span] = []
    for each in text.split(","):
        span = _SPAN.fullmatch(each.strip())
        if _INDEX.fullmatch(each.strip()):
            found.append(int(each))
        elif span is not None:
            begin, end, step = span.groups()
            found.append(Span(int(begin or 0), None if end is None else int(end), int(step or 1)))
        else:
            raise InvalidInputError(
                f"select: got {each.strip()!r}, expected an index such as 3 or -1, or a range such "
                f"as 0..8"
            )
    return tuple(found)


def _index(given: Any) -> int | Span:
    if isinstance(given, Span):
        return given
    if isinstance(given, range):
        if not given or given.step < 1 or given.start < 0:
            raise InvalidInputError(f"select: got {given}, expected an ascending range from 0")
        return Span(given.start, given.stop, given.step)
    if isinstance(given, slice):
        step = 1 if given.step is None else _whole(given.step)
        end = None if given.stop is None else _whole(given.stop)
        return Span(0 if given.start is None else _whole(given.start), end, step)
    return _whole(given)


def axis_of(given: Any) -> Axis | int:
    """Return an axis by its name, or the number of a dimension.

    Raises:
        InvalidInputError: If it is neither.
    """
    if isinstance(given, Integral):
        return _whole(given)
    try:
        return Axis(str(given))
    except ValueError:
        raise InvalidInputError(
            f"over: got {given!r}, expected axes ({', '.join(NAMED_AXES)}) or dimensions by number"
        ) from None


def _whole(given: Any) -> int:
    return whole_number(given, "select")
