"""The numbers and arrays of an intervention, as callers give them."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np

from layertap.errors import InvalidInputError
from layertap.float_arrays import as_array

__all__ = ["as_number", "as_operand"]


def as_number(given: Any) -> float:
    """Return a caller's number.

    Raises:
        InvalidInputError: If it is none.
    """
    if isinstance(given, bool) or not isinstance(given, Real):
        raise InvalidInputError(f"intervention: got {given!r}, expected a number")
    return float(given)


def as_operand(tensor: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a caller's tensor, array or number as an array; whole numbers become float32."""
    array = as_array(tensor)
    return array.astype(np.float32) if array.dtype.kind in "iu" else array
