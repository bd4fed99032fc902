"""The dtypes in numpy, and casts between them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

NUMPY: dict[int, np.dtype[Any]] = {
    1: np.dtype("<f4"),
    2: np.dtype("<f2"),
    3: np.dtype(ml_dtypes.bfloat16),
    4: np.dtype("<f8"),
    5: np.dtype("i1"),
    6: np.dtype("u1"),
    7: np.dtype("<i2"),
    8: np.dtype("<i4"),
    9: np.dtype("<i8"),
    10: np.dtype("?"),
}
FLOATS = frozenset({1, 2, 3, 4})
BOOL = 10


def cast_payload(view: memoryview, source: int, target: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    array = np.asarray(view).view(NUMPY[source])
    if source == 4 and target in {2, 3}:
        array = rounded_to_odd(array)
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(array.astype(NUMPY[target])).reshape(-1).view(np.uint8)


def rounded_to_odd(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Convert float64 to float32 so that the last bit is 1 if anything was cut off.

    ml_dtypes converts float64 to bfloat16 through float32, and would round twice.
    """
    with np.errstate(all="ignore"):
        nearest = array.astype(np.float32)
        bits = nearest.view(np.uint32)
        even = (bits & 1) == 0
        up = even & (np.abs(nearest.astype(np.float64)) < np.abs(array))
        down = even & (np.abs(nearest.astype(np.float64)) > np.abs(array))
    odd: np.ndarray[Any, Any] = (bits + up.astype(np.uint32) - down.astype(np.uint32)).view("<f4")
    return odd
