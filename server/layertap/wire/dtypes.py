"""The one dtype table: a row for each value of ``layertap.v1.DataType``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from layertap.errors import InvalidInputError

__all__ = [
    "DTYPES",
    "DType",
    "by_datatype",
    "by_name",
    "by_number",
    "is_known",
    "of_array",
    "proto_name",
]


@dataclass(frozen=True, slots=True)
class DType:
    """One dtype.

    Attributes:
        number: Its value in the ``layertap.v1.DataType`` enum.
        name: Its name, the same in torch, numpy and the protocol.
        itemsize: Bytes per element.
        numpy: The little-endian numpy dtype; bfloat16 comes from ml_dtypes.
        datatype: Its name in the Open Inference Protocol.
        is_float: Whether values in replies may be cast to another floating-point dtype.
    """

    number: int
    name: str
    itemsize: int
    numpy: np.dtype
    datatype: str
    is_float: bool = False

    @property
    def proto_name(self) -> Any:
        """Its name in ``layertap.v1.DataType``, which message constructors accept."""
        return f"DATA_TYPE_{self.name.upper()}"


DTYPES: tuple[DType, ...] = (
    DType(1, "float32", 4, np.dtype("<f4"), "FP32", is_float=True),
    DType(2, "float16", 2, np.dtype("<f2"), "FP16", is_float=True),
    DType(3, "bfloat16", 2, np.dtype(ml_dtypes.bfloat16), "BF16", is_float=True),
    DType(4, "float64", 8, np.dtype("<f8"), "FP64", is_float=True),
    DType(5, "int8", 1, np.dtype("i1"), "INT8"),
    DType(6, "uint8", 1, np.dtype("u1"), "UINT8"),
    DType(7, "int16", 2, np.dtype("<i2"), "INT16"),
    DType(8, "int32", 4, np.dtype("<i4"), "INT32"),
    DType(9, "int64", 8, np.dtype("<i8"), "INT64"),
    DType(10, "bool", 1, np.dtype("?"), "BOOL"),
)

_BY_NUMBER = {row.number: row for row in DTYPES}
_BY_NAME = {row.name: row for row in DTYPES}
_BY_DATATYPE = {row.datatype: row for row in DTYPES}
_BY_NUMPY = {row.numpy: row for row in DTYPES}


def by_number(number: int) -> DType:
    """Return the row for an enum value; raise InvalidInputError for an unknown value."""
    row = _BY_NUMBER.get(number)
    if row is None:
        raise InvalidInputError(f"dtype: got enum value {number}, expected one of {_choices()}")
    return row


def by_name(name: str) -> DType:
    """Return the row for a name such as ``"float16"``; raise InvalidInputError if unknown."""
    row = _BY_NAME.get(name)
    if row is None:
        raise InvalidInputError(f"dtype: got {name!r}, expected one of {_choices()}")
    return row


def by_datatype(name: str) -> DType:
    """Return the row for an Open Inference Protocol name; raise InvalidInputError if unknown."""
    row = _BY_DATATYPE.get(name)
    if row is None:
        choices = ", ".join(_BY_DATATYPE)
        raise InvalidInputError(f"datatype: got {name!r}, expected one of {choices}")
    return row


def is_known(name: str) -> bool:
    """Return whether the protocol carries a type, given by its name in torch."""
    return name in _BY_NAME


def proto_name(name: str) -> Any:
    """Return a type's name in ``layertap.v1.DataType``, which message constructors take.

    UNSPECIFIED for a type that the protocol does not carry.
    """
    row = _BY_NAME.get(name)
    return row.proto_name if row else "DATA_TYPE_UNSPECIFIED"


def of_array(array: np.ndarray) -> DType:
    """Return the row for a numpy array's dtype; raise InvalidInputError if it has no row."""
    row = _BY_NUMPY.get(array.dtype)
    if row is None:
        raise InvalidInputError(f"dtype: got numpy {array.dtype}, expected one of {_choices()}")
    return row


def _choices() -> str:
    return ", ".join(row.name for row in DTYPES)
