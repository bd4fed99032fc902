"""Dataclasses as JSON and back, for what is kept on disk.

Note [One row for each object]
    A catalogue names each of its points many times. So the dataclasses in ``SHARED`` are rows of
    tables, and a number stands where one of them occurs. That makes the file small, and reading it
    fast: each object is made once.

The fields of a dataclass are written in order, without their names. So records of
another version of the code must not be read.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch

from layertap.extraction.dimensions import Count, Expression, Term
from layertap.extraction.kinds.base import Verdict
from layertap.extraction.layout import Geometry
from layertap.extraction.points import CapturePoint, Dim, ValueSpec

__all__ = ["Record", "from_record", "to_record"]

T = TypeVar("T")

Record = dict[str, Any]
"""What ``json`` can write: the tables of shared objects, and the value itself as ``"value"``."""

SHARED = (CapturePoint, Count, Dim, Expression, Geometry, Term, ValueSpec, Verdict)
"""Frozen dataclasses, of which equal objects are written once."""

_NAMES = {kind.__name__: kind for kind in SHARED}


def to_record(value: object) -> Record:
    """Return a dataclass, and the dataclasses and containers in it, as JSON.

    Raises:
        TypeError: It holds something that is neither that nor a number, text, dtype or None.
    """
    writer = _Writer()
    written = writer.write(value)
    return {"tables": writer.tables, "value": written}


def from_record(kind: type[T], record: Record) -> T:
    """Return the value of a type that ``to_record`` was given.

    Raises:
        Exception: Anything, if the record is not one of that type.
    """
    return cast(T, _Reader(record["tables"]).read(kind, record["value"]))


class _Writer:
    def __init__(self) -> None:
        self.tables: dict[str, list[Any]] = {name: [] for name in _NAMES}
        self._rows: dict[object, int] = {}

    def write(self, value: Any) -> Any:  # noqa: PLR0911 - one for each kind of value
        if isinstance(value, SHARED):
            if value not in self._rows:
                table = self.tables[type(value).__name__]
                row = self._fields(value)
                self._rows[value] = len(table)
                table.append(row)
            return self._rows[value]
        if dataclasses.is_dataclass(value):
            return self._fields(value)
        if isinstance(value, enum.Enum):
            return value.value
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        if isinstance(value, Mapping):
            return [[self.write(key), self.write(each)] for key, each in value.items()]
        if isinstance(value, set | frozenset):
            return sorted(map(self.write, value))
        if isinstance(value, list | tuple):
            return [self.write(each) for each in value]
        raise TypeError(f"a record can't hold a {type(value).__name__}")

    def _fields(self, value: Any) -> list[Any]:
        return [self.write(getattr(value, field.name)) for field in dataclasses.fields(value)]


class _Reader:
    def __init__(self, tables: dict[str, list[Any]]) -> None:
        self._tables = tables
        self._made: dict[type, dict[int, Any]] = {kind: {} for kind in SHARED}

    def read(self, kind: Any, data: Any) -> Any:  # noqa: PLR0911 - one for each kind of value
        if kind in self._made:
            made = self._made[kind]
            if data not in made:
                made[data] = self._fields(kind, self._tables[kind.__name__][data])
            return made[data]
        if isinstance(kind, type):
            return self._plain(kind, data)
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if origin is types.UnionType or origin is typing.Union:
            if data is None:
                return None
            (own,) = (each for each in args if each is not type(None))
            return self.read(own, data)
        if origin is tuple and args[-1] is not Ellipsis:
            return tuple(self.read(each, part) for each, part in zip(args, data, strict=True))
        if issubclass(origin, Mapping):
            return {self.read(args[0], key): self.read(args[1], each) for key, each in data}
        members = [self.read(args[0], each) for each in data]
        if origin is tuple or origin is Sequence:
            return tuple(members)
        if origin is set:
            return set(members)
        return members if origin is list else frozenset(members)

    def _plain(self, kind: type, data: Any) -> Any:
        if dataclasses.is_dataclass(kind):
            return self._fields(kind, data)
        if issubclass(kind, enum.Enum):
            return kind(data)
        if kind is torch.dtype:
            dtype = getattr(torch, data)
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"{data} is no dtype")
            return dtype
        if type(data) is not kind:
            raise TypeError(f"got {type(data).__name__}, expected {kind.__name__}")
        return data

    def _fields(self, kind: Any, row: list[Any]) -> Any:
        fields = _types_of(kind)
        return kind(
            **{name: self.read(fields[name], part) for name, part in zip(fields, row, strict=True)}
        )


@functools.cache
def _types_of(kind: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass, in order."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(cast(Any, kind))}
