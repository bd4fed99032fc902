"""Tensors among the small fields of a request, such as the vector of an objective."""

from __future__ import annotations

from typing import Any

import numpy as np

from layertap.errors import DecodeError, InvalidInputError
from layertap.v1 import tensor_pb2
from layertap.wire.dtypes import by_number, of_array

__all__ = ["MAX_RANK", "array_from_proto", "array_to_proto"]

MAX_RANK = 32
"""Maximum number of dimensions."""


def array_to_proto(array: np.ndarray[Any, np.dtype[Any]]) -> tensor_pb2.Tensor:
    """Return the message of an array."""
    row = of_array(array)
    return tensor_pb2.Tensor(
        dtype=row.proto_name,
        shape=array.shape,
        data=np.ascontiguousarray(array, row.numpy).tobytes(),
    )


def array_from_proto(tensor: tensor_pb2.Tensor, what: str) -> np.ndarray[Any, np.dtype[Any]]:
    """Return the array of a message, as a read-only view.

    Args:
        tensor: The message.
        what: What the tensor is, for error messages.

    Raises:
        InvalidInputError: If its elements are in shared memory, or its dtype is unknown.
        DecodeError: If its bytes don't fit its shape.
    """
    if tensor.HasField("shared"):
        raise InvalidInputError(f"{what}: got shared memory, expected data")
    row, shape = by_number(tensor.dtype), tuple(tensor.shape)
    if len(shape) > MAX_RANK or any(size < 0 for size in shape):
        raise DecodeError(f"{what}: got shape {list(shape)[:MAX_RANK]}")
    elements = 1
    for size in shape:
        elements *= size
    if elements * row.itemsize != len(tensor.data):
        raise DecodeError(
            f"{what}: got {len(tensor.data)} bytes, expected "
            f"{elements * row.itemsize} for {row.name} {list(shape)}"
        )
    return np.frombuffer(tensor.data, row.numpy).reshape(shape)
