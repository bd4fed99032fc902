"""Converts between the protocol's enums and Python enums with the same names."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Protocol, TypeVar

from layertap.errors import InvalidInputError

__all__ = ["from_proto", "to_proto"]

E = TypeVar("E", bound=StrEnum)


class _EnumType(Protocol):
    def Name(self, number: int) -> str: ...  # noqa: N802 - protobuf's own name


def to_proto(member: StrEnum, prefix: str) -> Any:
    """Return ``PREFIX_MEMBER``, the enum value's name, which message constructors accept."""
    return f"{prefix}_{member.name}"


def from_proto(number: int, enum: _EnumType, prefix: str, default: E) -> E:
    """Return the Python member for a number; ``default`` for 0, which always means UNSPECIFIED.

    Raises:
        InvalidInputError: If the enum doesn't have the number.
    """
    if number == 0:
        return default
    try:
        name = enum.Name(number)
    except ValueError:
        names = ", ".join(member.name for member in type(default))
        raise InvalidInputError(
            f"{prefix.lower()}: got enum value {number}, expected one of {names}"
        ) from None
    return type(default)[name.removeprefix(f"{prefix}_")]
