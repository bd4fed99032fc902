"""Whole numbers that a caller gives."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from layertap.errors import InvalidInputError

__all__ = ["whole_number"]


def whole_number(given: Any, what: str) -> int:
    """Return a number that a message can hold.

    Args:
        given: What the caller gave.
        what: What it is, for error messages.

    Raises:
        InvalidInputError: If it is no whole number, or needs more than 64 bits.
    """
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise InvalidInputError(f"{what}: got {given!r}, expected a whole number")
    number = int(given)
    if not -(1 << 63) <= number < 1 << 63:
        raise InvalidInputError(f"{what}: got {number}, expected a 64-bit number")
    return number
