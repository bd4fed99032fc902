"""Tensors in messages: numpy arrays in, read-only views of the received bytes out.

Where a tensor's elements stand in shared memory the message has a SharedSlice in their place, and
anyone who knows the memory makes a view of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from layertap.errors import DecodeError, InvalidInputError
from layertap.wire import codec
from layertap.wire.dtypes import DType, by_number, of_array

__all__ = [
    "Arrays",
    "SharedSlice",
    "SharedTensor",
    "TensorView",
    "decode_message",
    "encode_message",
]

Arrays = Sequence[tuple[str, np.ndarray[Any, np.dtype[Any]]]]
"""Arrays with the names of the inputs that they are for; the name of an only input may be empty."""


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor that stands in a received message.

    Attributes:
        name: Its name in the message.
        dtype: The row of its element type.
        shape: Sizes, outermost first.
        data: The elements, little-endian in C order: a read-only view that keeps the message.
        remap: Returns them in memory that may be written to, where that of ``data`` may not.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    data: memoryview
    remap: Callable[[], memoryview] | None = None

    def array(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the elements as a read-only array of ``shape``, bfloat16 as ml_dtypes' type.

        The array shares the message's memory. Only where the elements don't stand on a multiple of
        their size, which layertap's own encoder never does to them, are they copied.
        """
        flat = np.frombuffer(self.data, dtype=self.dtype.numpy)
        if not flat.flags.aligned:
            flat = flat.copy()
            flat.flags.writeable = False
        return flat.reshape(self.shape)


class SharedSlice(NamedTuple):
    """Bytes in a region of shared memory, as a message has them: any four numbers of 64 bits."""

    region: int
    generation: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class SharedTensor:
    """A tensor whose elements stand in shared memory.

    Attributes:
        name: Its name in the message.
        dtype: The row of its element type.
        shape: Sizes, outermost first.
        at: Where the elements are said to stand; of the size that dtype and shape have.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    at: SharedSlice

    def view(self, data: memoryview, remap: Callable[[], memoryview] | None = None) -> TensorView:
        """Return the tensor with its elements, which were found at ``at``.

        Raises:
            DecodeError: For a byte of a bool tensor that is neither 0 nor 1.
        """
        if self.dtype.name == "bool" and len(data):
            most = int(np.frombuffer(data, np.uint8).max())
            if most > 1:
                raise DecodeError(f"tensor: shared: got byte {most} of a bool, expected 0 or 1")
        return TensorView(self.name, self.dtype, self.shape, data, remap)


def decode_message(
    message: bytes, field: int, most: int = codec.MAX_MESSAGE_BYTES, counted: Sequence[int] = ()
) -> tuple[bytes, list[TensorView | SharedTensor]]:
    """Split a message into its small rest and views of its tensors; see ``layertap._core.decode``.

    Args:
        message: The whole message.
        field: The number of the repeated field that holds tensors.
        most: Tensors that it may have.
        counted: The numbers of fields that hold a list, whose members count as fields.

    Returns:
        The bytes for the ordinary parser, and the tensors in the message's order.

    Raises:
        DecodeError: For a malformed message or a tensor that contradicts itself.
    """
    try:
        rest, found = codec.decode(message, field=field, most=most, counted=counted)
    except ValueError as error:
        raise DecodeError(str(error)) from None
    return rest, [
        SharedTensor(name, by_number(dtype), shape, SharedSlice(*data))
        if isinstance(data, tuple)
        else TensorView(name, by_number(dtype), shape, data)
        for name, dtype, shape, data in found
    ]


def encode_message(
    arrays: Sequence[tuple[str, np.ndarray[Any, np.dtype[Any]]]], field: int, head: bytes
) -> bytes:
    """Return ``head`` followed by named tensors as submessages ``field``.

    Args:
        arrays: (name, array) pairs; an array may have any strides and is read in one pass.
        field: The number of the field that holds tensors.
        head: The ordinary protobuf bytes of every other field.

    Raises:
        InvalidInputError: For an array without a row in the dtype table, a rank over 32, or a
            message over 2**31 - 1 bytes.
    """
    tensors = []
    for name, array in arrays:
        row = of_array(array)
        # numpy exports no buffer of ml_dtypes' types, so floats travel as the integers they are.
        bits = array.view(f"<u{row.itemsize}") if row.is_float else array
        tensors.append((name, row.number, bits.data))
    try:
        return codec.encode(tensors, field=field, head=head)
    except ValueError as error:
        raise InvalidInputError(str(error)) from None
