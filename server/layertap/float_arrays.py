"""Arrays of numbers that a caller sends beside the inputs. Without PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np

from layertap.errors import InvalidInputError

__all__ = ["FLOAT_DTYPES", "as_array", "check_floats"]

FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")
"""The dtypes that such an array may have."""


def as_array(given: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a caller's tensor, array or list as an array of a dtype that the protocol has."""
    if hasattr(given, "detach"):
        given = given.detach().cpu()
        if str(given.dtype) == "torch.bfloat16":
            given = given.float()
        given = given.numpy()
    array = np.asarray(given)
    # NumPy would make a list of a single number.
    return array if array.ndim == 0 else np.ascontiguousarray(array)


def check_floats(array: np.ndarray[Any, np.dtype[Any]], what: str) -> None:
    """Check that an array holds finite floating-point numbers.

    Args:
        array: The array.
        what: What it is, for error messages.

    Raises:
        InvalidInputError: If it has another dtype, or holds NaN or infinity.
    """
    if array.dtype.name not in FLOAT_DTYPES:
        raise InvalidInputError(f"{what}: got {array.dtype}, expected {', '.join(FLOAT_DTYPES)}")
    if not np.isfinite(array.astype(np.float64)).all():
        raise InvalidInputError(f"{what}: got NaN or infinity, expected numbers")
