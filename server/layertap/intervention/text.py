"""Reads interventions that are written as text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from layertap.errors import InvalidInputError
from layertap.intervention.operands import as_operand
from layertap.intervention.operation import Operation
from layertap.intervention.part import NAMED_AXES, Axis, axis_of, parts_of, read_indexes
from layertap.selection import Capture, cut_at

__all__ = ["read_text"]

_DIMENSION = re.compile(r"dim(\d{1,2})")


Load = Callable[[str], np.ndarray[Any, np.dtype[Any]]]
"""Returns the array that a name stands for."""


def read_text(text: str, load: Load | None) -> dict[str, Any]:
    """Return the arguments of the intervention that a text describes; see ``Intervention.parse``.

    Raises:
        InvalidInputError: If it can't be read.
    """
    return _Reader(text, load).arguments()


class _Reader:
    """Reads the text of one intervention."""

    def __init__(self, text: str, load: Load | None) -> None:
        self._text, self._load = text, load

    def arguments(self) -> dict[str, Any]:
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
                dims[int(dimension[1])] = read_indexes(value)
            elif equals and name == "heads" and value.isdecimal():
                where[name] = int(value[:18])
            elif equals and name in tuple(Axis):
                where[name] = read_indexes(value)
            else:
                raise self._refusal(
                    f"'input' or AXIS=INDICES between colons, such as channel=3,5, not {option!r}; "
                    f"the axes are {', '.join(NAMED_AXES)}, dim0, dim1, ..."
                )
        parts = parts_of({**where, "dims": dims})  # type: ignore[typeddict-item]
        return {
            "layer": re.sub(r"\\(.)", r"\1", layer),
            "operation": Operation(word),
            "parts": parts,
            "capture": capture,
            **self._operands(Operation(word), operands.strip()),
        }

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
        return {"over": tuple(axis_of(int(n) if n.isdecimal() else n) for n in names)}

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
        return as_operand(self._load(text[1:]))

    def _refusal(self, expected: str) -> InvalidInputError:
        return InvalidInputError(f"intervention: got {self._text!r}, expected {expected}")
