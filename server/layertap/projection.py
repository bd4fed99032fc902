"""Projections of channels by a matrix that the caller has fitted, such as that of a PCA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from layertap.errors import InvalidInputError
from layertap.float_arrays import as_array, check_floats

__all__ = ["Projection", "SentProjection"]

_Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """``(value - mean) @ matrix.T`` over the channels, at each place and for each item.

    scikit-learn's ``PCA`` calls these ``components_`` and ``mean_``.

    Attributes:
        matrix: ``[K, C]``, of a floating-point dtype: what each of the K new channels takes of the
            C old ones.
        mean: ``[C]``, of a floating-point dtype; None for zeros.

    Raises:
        InvalidInputError: If they have other dimensions or dtypes, or hold NaN or infinity.
    """

    matrix: _Array
    mean: _Array | None = None

    def __post_init__(self) -> None:
        matrix = as_array(self.matrix)
        check_floats(matrix, "projection: matrix")
        if matrix.ndim != 2 or not matrix.size:
            raise InvalidInputError(
                f"projection: matrix: got the shape {list(matrix.shape)}, expected [K, C]: new "
                f"channels and the layer's channels"
            )
        object.__setattr__(self, "matrix", matrix)
        if self.mean is None:
            return
        mean = as_array(self.mean)
        check_floats(mean, "projection: mean")
        if mean.shape != matrix.shape[1:]:
            raise InvalidInputError(
                f"projection: mean: got the shape {list(mean.shape)}, expected "
                f"[{matrix.shape[1]}], the channels that the matrix takes"
            )
        object.__setattr__(self, "mean", mean)

    @classmethod
    def load(cls, file: str) -> Projection:
        """Read a matrix from an .npy file, or from an .npz file ``matrix`` and maybe ``mean``.

        scikit-learn's names ``components_`` and ``mean_`` are read too.

        Raises:
            InvalidInputError: If the file can't be read, or lacks a matrix.
        """
        try:
            stored = np.load(file, allow_pickle=False)
            if isinstance(stored, np.ndarray):
                return cls(stored)
            with stored:
                arrays = {name.rstrip("_"): stored[name] for name in stored.files}
        except (OSError, ValueError, EOFError) as error:
            raise InvalidInputError(f"projection {file}: {error}") from error
        matrix = arrays.get("matrix", arrays.get("components"))
        if matrix is None:
            raise InvalidInputError(
                f"projection {file}: got the arrays {', '.join(arrays) or 'none'}, expected matrix "
                f"(or components_), and maybe mean (or mean_)"
            )
        return cls(matrix, arrays.get("mean"))


@dataclass(frozen=True, slots=True)
class SentProjection:
    """A projection whose numbers are kept apart from the selection.

    Selections are kept with plans and compared with others, which arrays can't be.

    Attributes:
        number: Which of the request's projections it is.
    """

    number: int
