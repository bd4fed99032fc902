"""One intervention: a change of a value while the model runs."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, NamedTuple, Unpack

import numpy as np

from layertap.errors import InvalidInputError
from layertap.float_arrays import FLOAT_DTYPES
from layertap.intervention.operands import as_number, as_operand
from layertap.intervention.operation import Operation
from layertap.intervention.part import Axis, Part, Where, axis_of, parts_of
from layertap.intervention.text import read_text
from layertap.selection import Capture
from layertap.whole_numbers import whole_number

__all__ = ["MAX_SETS", "Intervention", "SiteKey"]

MAX_SETS = 256
"""Maximum number of sets of interventions of a request."""


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
        whole_number(self.source_item, "source_item")
        whole_number(self.seed, "seed")
        for limit in (self.low, self.high):
            if limit is not None:
                as_number(limit)
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
        return cls(layer, Operation.ZERO, parts_of(where))

    @classmethod
    def set_to(cls, layer: str, value: float, **where: Unpack[Where]) -> Intervention:
        """Return one that sets elements to a number."""
        return cls(layer, Operation.SET, parts_of(where), value=as_number(value))

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
        return cls(layer, Operation.MEAN, parts_of(where), over=tuple(map(axis_of, given)))

    @classmethod
    def scale(cls, layer: str, factor: float, **where: Unpack[Where]) -> Intervention:
        """Return one that multiplies elements by a number."""
        return cls(layer, Operation.SCALE, parts_of(where), factor=as_number(factor))

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
        parts, array = parts_of(where), as_operand(tensor)
        return cls(layer, Operation.ADD, parts, tensor=array, factor=as_number(factor))

    @classmethod
    def replace(cls, layer: str, tensor: Any, **where: Unpack[Where]) -> Intervention:
        """Return one that replaces elements by those of a tensor; see ``Intervention.tensor``."""
        return cls(layer, Operation.REPLACE, parts_of(where), tensor=as_operand(tensor))

    @classmethod
    def patch(cls, layer: str, source_item: int, **where: Unpack[Where]) -> Intervention:
        """Return one that takes the same part of another item of the batch.

        To take it from another input, send that as an item of the batch too.
        """
        return cls(
            layer,
            Operation.PATCH,
            parts_of(where),
            source_item=source_item,
        )

    @classmethod
    def project_out(cls, layer: str, direction: Any, **where: Unpack[Where]) -> Intervention:
        """Return one that removes the component along a direction of the channels."""
        return cls(layer, Operation.PROJECT_OUT, parts_of(where), tensor=as_operand(direction))

    @classmethod
    def project_keep(cls, layer: str, direction: Any, **where: Unpack[Where]) -> Intervention:
        """Return one that keeps only the component along a direction of the channels."""
        return cls(layer, Operation.PROJECT_KEEP, parts_of(where), tensor=as_operand(direction))

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
        parts, array = parts_of(where), as_operand(direction)
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
        return cls(layer, Operation.CLAMP, parts_of(where), low=low, high=high)

    @classmethod
    def noise(
        cls, layer: str, factor: float = 1.0, *, seed: int = 0, **where: Unpack[Where]
    ) -> Intervention:
        """Return one that adds normally distributed numbers with a standard deviation."""
        parts = parts_of(where)
        return cls(layer, Operation.NOISE, parts, factor=as_number(factor), seed=seed)

    @classmethod
    def skip(cls, layer: str, **where: Unpack[Where]) -> Intervention:
        """Return one that gives what the module was given in place of what it returned."""
        return cls(layer, Operation.SKIP, parts_of(where))

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
        return cls(**read_text(text, load))
