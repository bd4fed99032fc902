"""Places that hold one value each: reads and writes them."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

__all__ = ["MISSING", "Place", "attribute_place", "cell_place", "item_place", "slot_place"]

MISSING: Any = object()
"""What an empty place holds."""

Place = tuple[Callable[[], Any], Callable[[Any], None]]
"""Functions that read a place, and that write to it."""


def cell_place(cell: types.CellType) -> Place:
    """Return the place of a variable that a function has of the code around it."""

    def read() -> Any:
        try:
            return cell.cell_contents
        except ValueError:  # The cell is empty.
            return MISSING

    def write(value: Any) -> None:
        if value is MISSING:
            del cell.cell_contents
        else:
            cell.cell_contents = value

    return read, write


def slot_place(descriptor: Any, owner: Any) -> Place:
    """Return the place of an attribute in an object's slots."""

    def read() -> Any:
        try:
            return descriptor.__get__(owner, type(owner))
        except AttributeError:
            return MISSING

    def write(value: Any) -> None:
        if value is MISSING:
            descriptor.__delete__(owner)
        else:
            descriptor.__set__(owner, value)

    return read, write


def item_place(values: dict[str, Any], key: str) -> Place:
    """Return the place of an entry of a dictionary."""

    def write(value: Any) -> None:
        if value is MISSING:
            values.pop(key, None)
        else:
            values[key] = value

    return lambda: values.get(key, MISSING), write


def attribute_place(kind: type, name: str) -> Place:
    """Return the place of an attribute of a class."""

    def write(value: Any) -> None:
        if value is MISSING:
            delattr(kind, name)
        else:
            setattr(kind, name, value)

    return lambda: vars(kind).get(name, MISSING), write
