"""Interventions: changes of a model's values while it runs, as a request describes them.

Without PyTorch. An intervention is data: it names a layer, a part of the layer's value and one of a
fixed list of operations. It never contains code, pickles or paths.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from numbers import Integral, Real
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np

from layertap.errors import InvalidInputError
from layertap.float_arrays import FLOAT_DTYPES, as_array
from layertap.selection import Capture, cut_at
from layertap.whole_numbers import whole_number

__all__ = [
    "MAX_INDEXES",
    "MAX_INTERVENTIONS",
    "MAX_SETS",
    "REPORT_PREFIX",
    "Axis",
    "Intervention",
    "InterventionsLike",
    "Operation",
    "Part",
    "SiteKey",
    "Span",
    "Where",
    "check_count",
    "check_interventions",
    "parse_interventions",
]

MAX_INTERVENTIONS = 1024
"""Maximum number of interventions of a request."""

MAX_SETS = 256
"""Maximum number of sets of interventions of a request."""

MAX_INDEXES = 1 << 16
"""Maximum number of indices and ranges of all interventions of a request."""

REPORT_PREFIX = "interventions."
"""How the names begin under which a reply tells what interventions changed."""


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


_NAMED_AXES = tuple(axis.value for axis in Axis if axis is not Axis.DIMENSION)


class Operation(StrEnum):
    """What is done to a part of a value; ``layertap.v1.Operation`` has the same names."""

    ZERO = "zero"
    SET = "set"
    """Every element becomes a number."""
    MEAN = "mean"
    """Every element becomes the mean over some axes of the selected part."""
    SCALE = "scale"
    """Multiplies by a number."""
    ADD = "add"
    """Adds a tensor times a factor."""
    REPLACE = "replace"
    """The elements of a tensor."""
    PATCH = "patch"
    """The same part of another item of the batch."""
    PROJECT_OUT = "project_out"
    """Removes the component along a direction of the channels."""
    PROJECT_KEEP = "project_keep"
    """Keeps only that component."""
    CAP = "cap"
    """Limits that component to a range."""
    CLAMP = "clamp"
    """Limits every element to a range."""
    NOISE = "noise"
    """Adds normally distributed numbers, from a seed."""
    SKIP = "skip"
    """What the module was given, as if it were not there."""

    @property
    def takes_tensor(self) -> bool:
        """Whether it needs a tensor."""
        return self in (Operation.ADD, Operation.REPLACE) or self.takes_direction

    @property
    def takes_direction(self) -> bool:
        """Whether its tensor is a direction: one number for each channel."""
        return self in (Operation.PROJECT_OUT, Operation.PROJECT_KEEP, Operation.CAP)

    @property
    def takes_range(self) -> bool:
        """Whether it needs a lower or an upper limit."""
        return self in (Operation.CAP, Operation.CLAMP)


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


class SiteKey(NamedTuple):
    """What an intervention has in common with those of other requests that the same plan serves.

    Attributes:
        layer: A name from the catalogue or a glob; if empty, the model's own result.
        capture: The side of the layer: OUTPUT or INPUT.
        skips: Whether it needs what the module was given.
        set: The number of its set, from 1; 0 if it belongs to all sets.
    """

    layer: str
    capture: Capture
    skips: bool
    set: int


_OPERANDS: tuple[tuple[str, float, tuple[Operation, ...]], ...] = (
    ("value", 0.0, (Operation.SET,)),
    ("factor", 1.0, (Operation.SCALE, Operation.ADD, Operation.NOISE)),
    ("source_item", 0, (Operation.PATCH,)),
    ("seed", 0, (Operation.NOISE,)),
)
"""The numbers of an intervention: attribute, default, and the operations that take it."""


@dataclass(frozen=True, slots=True, eq=False)
class Intervention:
    """A change of what a layer returns or is given, while the model runs.

    The class methods make interventions, one for each operation. They take the layer's name, the
    operands, and the part to change as named axes: ``Intervention.zero("layer4", channel=3)``.

    Attributes:
        layer: A name from the catalogue or a glob over it; if empty, the model's own result.
        operation: What is done.
        parts: The part of the value: the product of these. The whole value without any.
        capture: The side of the layer: OUTPUT or INPUT.
        value: For SET: the number.
        factor: For SCALE, ADD and NOISE: the factor.
        low: For CLAMP and CAP: the lower limit; None for none.
        high: For CLAMP and CAP: the upper limit; None for none.
        tensor: For ADD and REPLACE: a single number, one number for each selected channel, the
            shape of the selected part of an item, or ``[items, ...]`` to have one for each selected
            item. For PROJECT_OUT, PROJECT_KEEP and CAP: one number for each selected channel.
        source_item: For PATCH: the item of the batch from which the part is taken.
        seed: For NOISE: seeds it. It is the same for each item.
        over: For MEAN: the axes, or dimensions by number, over which it is taken.
        set: The number of its set, from 1; 0 if it belongs to all sets.

    Raises:
        InvalidInputError: If these contradict each other, or a number is not in its range.
    """

    layer: str
    operation: Operation
    parts: tuple[Part, ...] = ()
    capture: Capture = Capture.OUTPUT
    value: float = 0.0
    factor: float = 1.0
    low: float | None = None
    high: float | None = None
    tensor: np.ndarray[Any, np.dtype[Any]] | None = None
    source_item: int = 0
    seed: int = 0
    over: tuple[Axis | int, ...] = ()
    set: int = 0

    def __post_init__(self) -> None:
        if self.capture.is_gradient:
            raise self._refusal(f"capture: got {self.capture.name}, expected OUTPUT or INPUT")
        if math.isnan(self.value):
            raise self._refusal("value: got NaN, expected a number")
        if not math.isfinite(self.factor):
            raise self._refusal(f"factor: got {self.factor}, expected a finite number")
        if self.operation is Operation.NOISE and self.factor < 0:
            raise self._refusal(f"factor: got {self.factor}, expected a number from 0")
        if not 0 <= self.seed < 1 << 63:
            raise self._refusal(f"seed: got {self.seed}, expected from 0 to 2**63 - 1")
        if not 0 <= self.set <= MAX_SETS:
            raise self._refusal(f"set: got {self.set}, expected at most {MAX_SETS} sets")
        if not 0 <= self.source_item < 1 << 31:
            raise self._refusal(f"source_item: got {self.source_item}, expected from 0")
        self._check_operands()
        self._check_range()
        self._check_tensor()
        self._check_parts()

    def _check_operands(self) -> None:
        """Refuse a number that the operation ignores, such as a value where a factor counts."""
        for name, default, operations in _OPERANDS:
            given = getattr(self, name)
            if given != default and self.operation not in operations:
                takes = ", ".join(each.name for each in operations)
                raise self._refusal(f"{name}: got {given}, expected one only for {takes}")

    def _check_range(self) -> None:
        given = [each for each in (self.low, self.high) if each is not None]
        if bool(given) != self.operation.takes_range:
            takes = ", ".join(each.name for each in Operation if each.takes_range)
            raise self._refusal(f"low, high: expected at least one for {takes}, none for others")
        if any(map(math.isnan, given)):
            raise self._refusal("low, high: got NaN, expected numbers")
        if len(given) == 2 and given[0] > given[1]:
            raise self._refusal(f"low, high: got {given[0]} and {given[1]}, expected low <= high")

    def _check_tensor(self) -> None:
        if (self.tensor is not None) != self.operation.takes_tensor:
            takes = ", ".join(each.name for each in Operation if each.takes_tensor)
            raise self._refusal(f"tensor: expected one for {takes}, none for others")
        if self.tensor is None:
            return
        if self.tensor.dtype.name not in FLOAT_DTYPES:
            expected = ", ".join(FLOAT_DTYPES)
            raise self._refusal(f"tensor: got {self.tensor.dtype}, expected {expected}")
        wide = self.tensor.astype(np.float64)
        if np.isnan(wide).any():
            raise self._refusal("tensor: got NaN, expected numbers")
        if self.operation is not Operation.REPLACE and not np.isfinite(wide).all():
            raise self._refusal("tensor: got infinity, expected finite numbers")
        if self.operation.takes_direction and (wide.ndim != 1 or not wide.any()):
            raise self._refusal(
                f"tensor: got {list(wide.shape)}, expected a direction: one number for each "
                f"channel, not all of them 0"
            )

    def _check_parts(self) -> None:
        names = [part.name for part in self.parts]
        if len(set(names)) < len(names):
            raise self._refusal(f"select: got {', '.join(names)}, expected each axis once")
        if (self.operation is Operation.MEAN) != bool(self.over):
            raise self._refusal("over: expected at least one axis for MEAN, none for others")
        if len(set(self.over)) < len(self.over) or Axis.DIMENSION in self.over:
            raise self._refusal("over: expected each axis once, and dimensions by their number")
        if any(isinstance(each, Integral) and not 0 <= each < 32 for each in self.over):
            raise self._refusal("over: dimensions: expected from 0 to 31")
        if self.operation is Operation.SKIP and self.capture is Capture.INPUT:
            raise self._refusal("capture: SKIP is about what a module returns, expected OUTPUT")

    def _refusal(self, what: str) -> InvalidInputError:
        return InvalidInputError(f"intervention {self.name}: {what}")

    @property
    def name(self) -> str:
        """Its name in messages: the operation and the layer."""
        side = ":input" if self.capture is Capture.INPUT else ""
        return f"{self.operation.name} of {(self.layer or 'the result') + side!r}"

    @property
    def key(self) -> SiteKey:
        """What it has in common with interventions of other requests."""
        return SiteKey(self.layer, self.capture, self.operation is Operation.SKIP, self.set)

    @property
    def mixes_items(self) -> bool:
        """Whether what an item becomes depends on other items of the batch."""
        return self.operation is Operation.PATCH or Axis.ITEM in self.over

    @property
    def picks_items(self) -> bool:
        """Whether it is about items by their place in the batch."""
        return self.mixes_items or any(part.axis is Axis.ITEM for part in self.parts)

    @property
    def summary(self) -> str:
        """A short text that is equal only for interventions that do the same: one to read.

        It has the form of ``parse`` but for the operands, of which tensors have their digest.
        """
        layer = re.sub(r"([\\:])", r"\\\1", self.layer)
        side = [self.capture.value] if self.capture is not Capture.OUTPUT else []
        path = ":".join([layer, *side, *(part.text for part in self.parts), self.operation])
        operands: dict[str, Any] = {
            name: getattr(self, name)
            for name, _, operations in _OPERANDS
            if self.operation in operations
        }
        operands |= {"low": self.low, "high": self.high, "set": self.set or None}
        if self.tensor is not None:
            digest = hashlib.sha256(np.ascontiguousarray(self.tensor).tobytes()).hexdigest()
            operands["tensor"] = f"{self.tensor.dtype}{list(self.tensor.shape)} {digest}"
        if self.over:
            operands["over"] = ",".join(map(str, self.over))
        given = (f"{name}={value}" for name, value in operands.items() if value is not None)
        return " ".join([path, *given])

    @classmethod
    def zero(cls, layer: str, **where: Unpack[Where]) -> Intervention:
        """Return one that sets elements to 0."""
        return cls(layer, Operation.ZERO, _parts(where))

    @classmethod
    def set_to(cls, layer: str, value: float, **where: Unpack[Where]) -> Intervention:
        """Return one that sets elements to a number."""
        return cls(layer, Operation.SET, _parts(where), value=_number(value))

    @classmethod
    def mean(
        cls, layer: str, over: Axis | str | int | Sequence[Axis | str | int], **where: Unpack[Where]
    ) -> Intervention:
        """Return one that sets elements to the mean of the selected part over some axes.

        Args:
            layer: The layer.
            over: Names of axes, such as ``("y", "x")``, or dimensions of an item by number.
            where: The part.
        """
        given = [over] if isinstance(over, str | int) else list(over)
        return cls(layer, Operation.MEAN, _parts(where), over=tuple(map(_axis, given)))

    @classmethod
    def scale(cls, layer: str, factor: float, **where: Unpack[Where]) -> Intervention:
        """Return one that multiplies elements by a number."""
        return cls(layer, Operation.SCALE, _parts(where), factor=_number(factor))

    @classmethod
    def add(
        cls, layer: str, tensor: Any, *, factor: float = 1.0, **where: Unpack[Where]
    ) -> Intervention:
        """Return one that adds a tensor times a factor.

        Args:
            layer: The layer.
            tensor: A number, or an array or torch tensor; see ``Intervention.tensor``.
            factor: The factor.
            where: The part.
        """
        parts, array = _parts(where), _array(tensor)
        return cls(layer, Operation.ADD, parts, tensor=array, factor=_number(factor))

    @classmethod
    def replace(cls, layer: str, tensor: Any, **where: Unpack[Where]) -> Intervention:
        """Return one that replaces elements by those of a tensor; see ``Intervention.tensor``."""
        return cls(layer, Operation.REPLACE, _parts(where), tensor=_array(tensor))

    @classmethod
    def patch(cls, layer: str, source_item: int, **where: Unpack[Where]) -> Intervention:
        """Return one that takes the same part of another item of the batch.

        To take it from another input, send that as an item of the batch too.
        """
        return cls(layer, Operation.PATCH, _parts(where), source_item=source_item)

    @classmethod
    def project_out(cls, layer: str, direction: Any, **where: Unpack[Where]) -> Intervention:
        """Return one that removes the component along a direction of the channels."""
        return cls(layer, Operation.PROJECT_OUT, _parts(where), tensor=_array(direction))

    @classmethod
    def project_keep(cls, layer: str, direction: Any, **where: Unpack[Where]) -> Intervention:
        """Return one that keeps only the component along a direction of the channels."""
        return cls(layer, Operation.PROJECT_KEEP, _parts(where), tensor=_array(direction))

    @classmethod
    def cap(
        cls,
        layer: str,
        direction: Any,
        *,
        low: float | None = None,
        high: float | None = None,
        **where: Unpack[Where],
    ) -> Intervention:
        """Return one that limits the component along a direction of the channels to a range."""
        parts, array = _parts(where), _array(direction)
        return cls(layer, Operation.CAP, parts, tensor=array, low=low, high=high)

    @classmethod
    def clamp(
        cls,
        layer: str,
        *,
        low: float | None = None,
        high: float | None = None,
        **where: Unpack[Where],
    ) -> Intervention:
        """Return one that limits elements to a range."""
        return cls(layer, Operation.CLAMP, _parts(where), low=low, high=high)

    @classmethod
    def noise(
        cls, layer: str, factor: float = 1.0, *, seed: int = 0, **where: Unpack[Where]
    ) -> Intervention:
        """Return one that adds normally distributed numbers with a standard deviation."""
        parts = _parts(where)
        return cls(layer, Operation.NOISE, parts, factor=_number(factor), seed=seed)

    @classmethod
    def skip(cls, layer: str, **where: Unpack[Where]) -> Intervention:
        """Return one that gives what the module was given in place of what it returned."""
        return cls(layer, Operation.SKIP, _parts(where))

    def of_input(self) -> Intervention:
        """Return the intervention on what its layer is given instead of what it returns."""
        return replace(self, capture=Capture.INPUT)

    @classmethod
    def parse(
        cls, text: str, load: Callable[[str], np.ndarray[Any, np.dtype[Any]]] | None = None
    ) -> Intervention:
        """Read ``LAYER[:input][:AXIS=INDICES]...:OPERATION[=OPERANDS]``.

        Examples are ``layer4:channel=3:zero``, ``layer4:y=0..3:x=2,5:scale=0.5`` and
        ``encoder.0:token=-1:noise=0.1``. A range ``0..8..2`` is from 0 to before 8, by 2.

        Args:
            text: The text.
            load: Returns the array that ``@NAME`` stands for, as in ``add=2*@NAME``; None if there
                are no arrays.
        """
        return _Parser(text, load).intervention()


InterventionLike = Intervention | str
InterventionsLike = (
    InterventionLike | Sequence[InterventionLike] | Sequence[Sequence[InterventionLike]]
)
"""An intervention or its text; a list of these; or a list of such lists, one for each set."""


def parse_interventions(given: InterventionsLike | None) -> tuple[Intervention, ...]:
    """Convert a caller's interventions, and number their sets if there are several.

    Raises:
        InvalidInputError: If there are too many; or a text can't be read, see ``parse``.
    """
    if given is None:
        return ()
    if isinstance(given, Intervention | str):
        given = [given]
    members: list[Any] = list(given)
    flat: list[Intervention] = []
    sets = [each for each in members if isinstance(each, Sequence) and not isinstance(each, str)]
    if sets and len(sets) < len(members):
        raise InvalidInputError(
            "interventions: got interventions beside lists of them, expected one or the other"
        )
    for number, member in enumerate(members, 1):
        several = list(member) if isinstance(member, Sequence) and sets else [member]
        if sets and not several:
            raise InvalidInputError(
                f"interventions: set {number}: got none, expected at least one; scaling by 1 "
                f"changes nothing"
            )
        for each in several:
            if not isinstance(each, Intervention | str):
                raise InvalidInputError(
                    f"interventions: got {type(each).__name__}, expected an Intervention or a text"
                )
            read = Intervention.parse(each) if isinstance(each, str) else each
            flat.append(replace(read, set=number) if sets else read)
            check_count(len(flat))
    return check_interventions(flat)


def check_count(count: int) -> None:
    """Raise InvalidInputError for too many interventions."""
    if count > MAX_INTERVENTIONS:
        raise InvalidInputError(
            f"interventions: got more than {MAX_INTERVENTIONS}, the most allowed"
        )


def check_interventions(given: Sequence[Intervention]) -> tuple[Intervention, ...]:
    """Return the interventions of a request.

    Raises:
        InvalidInputError: If they have too many indices together, or a set is missing.
    """
    check_count(len(given))
    if sum(len(part.indexes) for each in given for part in each.parts) > MAX_INDEXES:
        raise InvalidInputError(
            f"interventions: got more than {MAX_INDEXES} indices and ranges together; a range is "
            f"shorter than its indices"
        )
    sets = {each.set for each in given} - {0}
    missing = set(range(1, max(sets, default=0) + 1)) - sets
    if missing:
        raise InvalidInputError(
            f"interventions: got no intervention of set {min(missing)}, expected sets from 1 to "
            f"{max(sets)}"
        )
    return tuple(given)


def _parts(where: Where) -> tuple[Part, ...]:
    given: dict[str, Any] = dict(where)
    dims, heads = given.pop("dims", {}), given.pop("heads", 0)
    unknown = given.keys() - set(_NAMED_AXES)
    if unknown:
        raise InvalidInputError(
            f"select: got {min(unknown)!r}, expected one of {', '.join(_NAMED_AXES)}, dims or heads"
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
        return _read_indexes(given)
    members = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(members, Sequence):
        raise InvalidInputError(f"select: got {members!r}, expected indices and ranges")
    return tuple(map(_index, members))


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


def _whole(given: Any) -> int:
    return whole_number(given, "select")


def _number(given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, Real):
        raise InvalidInputError(f"intervention: got {given!r}, expected a number")
    return float(given)


def _axis(given: Any) -> Axis | int:
    if isinstance(given, Integral):
        return _whole(given)
    try:
        return Axis(str(given))
    except ValueError:
        raise InvalidInputError(
            f"over: got {given!r}, expected axes ({', '.join(_NAMED_AXES)}) or dimensions by number"
        ) from None


def _array(tensor: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a caller's tensor, array or number as an array; whole numbers become float32."""
    array = as_array(tensor)
    return array.astype(np.float32) if array.dtype.kind in "iu" else array


_INDEX = re.compile(r"-?\d{1,18}")
_SPAN = re.compile(r"(-?\d{1,18})?\.\.(-?\d{1,18})?(?:\.\.(\d{1,18}))?")
_DIMENSION = re.compile(r"dim(\d{1,2})")


def _read_indexes(text: str) -> tuple[int | Span, ...]:
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


class _Parser:
    """Reads the text of one intervention; see ``Intervention.parse``."""

    def __init__(
        self, text: str, load: Callable[[str], np.ndarray[Any, np.dtype[Any]]] | None
    ) -> None:
        self._text, self._load = text, load

    def intervention(self) -> Intervention:
        layer, sign, rest = cut_at(self._text.strip(), ":")
        *options, last = rest.split(":") if sign else [""]
        word, _, operands = last.partition("=")
        if word not in tuple(Operation):
            raise self._refusal(f"one of {', '.join(Operation)} after the last colon")
        capture = Capture.OUTPUT
        where: dict[str, Any] = {}
        dims: dict[int, Any] = {}
        seen: set[str] = set()
        for option in options:
            name, equals, value = option.partition("=")
            dimension = _DIMENSION.fullmatch(name)
            name = f"dim{int(dimension[1])}" if dimension else name
            if name in seen:
                raise self._refusal(f"{name} once; several indices are written channel=3,4")
            seen.add(name)
            if option == Capture.INPUT:
                capture = Capture.INPUT
            elif equals and dimension:
                dims[int(dimension[1])] = _read_indexes(value)
            elif equals and name == "heads" and value.isdecimal():
                where[name] = int(value[:18])
            elif equals and name in tuple(Axis):
                where[name] = _read_indexes(value)
            else:
                raise self._refusal(
                    f"'input' or AXIS=INDICES between colons, such as channel=3,5, not {option!r}; "
                    f"the axes are {', '.join(_NAMED_AXES)}, dim0, dim1, ..."
                )
        parts = _parts({**where, "dims": dims})  # type: ignore[typeddict-item]
        layer = re.sub(r"\\(.)", r"\1", layer)
        given = self._operands(Operation(word), operands.strip())
        return Intervention(layer, Operation(word), parts, capture, **given)

    def _operands(self, operation: Operation, text: str) -> dict[str, Any]:
        read: dict[Operation, Callable[[str], dict[str, Any]]] = {
            Operation.ZERO: self._nothing,
            Operation.SKIP: self._nothing,
            Operation.SET: lambda given: {"value": self._float(given)},
            Operation.SCALE: lambda given: {"factor": self._float(given)},
            Operation.MEAN: self._over,
            Operation.PATCH: lambda given: {"source_item": self._count(given)},
            Operation.CLAMP: self._range,
            Operation.NOISE: self._noise,
            Operation.ADD: self._added,
            Operation.CAP: self._cap,
        }
        return read[operation](text) if operation in read else {"tensor": self._tensor(text)}

    def _nothing(self, text: str) -> dict[str, Any]:
        if text:
            raise self._refusal("nothing after this operation")
        return {}

    def _over(self, text: str) -> dict[str, Any]:
        names = (each.strip() for each in text.split(","))
        return {"over": tuple(_axis(int(n) if n.isdecimal() else n) for n in names)}

    def _count(self, text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text.strip()):
            raise self._refusal(f"a whole number, not {text!r}")
        return int(text)

    def _noise(self, text: str) -> dict[str, Any]:
        factor, _, seed = text.partition(",")
        return {"factor": self._float(factor), "seed": self._count(seed) if seed else 0}

    def _added(self, text: str) -> dict[str, Any]:
        factor, star, name = text.rpartition("*")
        scale = {"factor": self._float(factor)} if star else {}
        return {"tensor": self._tensor(name), **scale}

    def _cap(self, text: str) -> dict[str, Any]:
        name, _, limits = text.partition(",")
        return {"tensor": self._tensor(name), **self._range(limits)}

    def _range(self, text: str) -> dict[str, Any]:
        low, dots, high = text.partition("..")
        if not dots:
            raise self._refusal("a range such as 0..6 or ..6")
        return {
            "low": self._float(low) if low.strip() else None,
            "high": self._float(high) if high.strip() else None,
        }

    def _float(self, text: str) -> float:
        try:
            return float(text)
        except ValueError:
            raise self._refusal(f"a number, not {text!r}") from None

    def _tensor(self, text: str) -> np.ndarray[Any, np.dtype[Any]]:
        if not text.startswith("@"):
            return np.asarray(self._float(text), np.float32)
        if self._load is None:
            raise self._refusal("a number: an array can't be part of a text")
        return _array(self._load(text[1:]))

    def _refusal(self, expected: str) -> InvalidInputError:
        return InvalidInputError(f"intervention: got {self._text!r}, expected {expected}")
