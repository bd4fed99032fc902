"""Tensors in messages: encodes numpy arrays, and decodes to read-only views of received bytes.

If a tensor's elements are in shared memory, the message has a SharedSlice instead of them. Code
that has access to the memory can make a view of it.
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
"""(input name, array) pairs; the name may be empty if there is only one input."""


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor in a received message.

    Attributes:
        name: Its name in the message.
        dtype: The row of its dtype.
        shape: Its shape.
        data: The elements, little-endian in C order. A read-only view that keeps the message alive.
        remap: Returns the elements in writable memory, if ``data`` is not writable.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    data: memoryview
    remap: Callable[[], memoryview] | None = None

    def array(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the elements as a read-only array of ``shape``, bfloat16 with ml_dtypes' dtype.

        The array shares the message's memory. The elements are copied only if they are not aligned
        to their size, which never happens in messages from layertap's own encoder.
        """
        flat = np.frombuffer(self.data, dtype=self.dtype.numpy)
        if not flat.flags.aligned:
            flat = flat.copy()
            flat.flags.writeable = False
        return flat.reshape(self.shape)


class SharedSlice(NamedTuple):
    """Bytes in a region of shared memory, as a message gives them: unchecked 64-bit numbers."""

    region: int
    generation: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class SharedTensor:
    """A tensor whose elements are in shared memory.

    Attributes:
        name: Its name in the message.
        dtype: The row of its dtype.
        shape: Its shape.
        at: Where the message says that the elements are; its size fits the dtype and shape.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    at: SharedSlice

    def view(self, data: memoryview, remap: Callable[[], memoryview] | None = None) -> TensorView:
        """Return the tensor with the elements that were found at ``at``.

        Raises:
            DecodeError: If a byte of a bool tensor is neither 0 nor 1.
        """
        if self.dtype.name == "bool" and len(data):
            most = int(np.frombuffer(data, np.uint8).max())
            if most > 1:
                raise DecodeError(f"tensor: shared: got byte {most} of a bool, expected 0 or 1")
        return TensorView(self.name, self.dtype, self.shape, data, remap)


def decode_message(
    message: bytes, field: int, most: int = codec.MAX_MESSAGE_BYTES, counted: Sequence[int] = ()
) -> tuple[bytes, list[TensorView | SharedTensor]]:
    """Split a message into its small fields and views of its tensors; see ``_core.decode``.

    Args:
        message: The whole message.
        field: The number of the repeated field that holds tensors.
        most: Maximum number of tensors.
        counted: The numbers of fields that hold lists; their members count as fields.

    Returns:
        The bytes for the ordinary parser, and the tensors in the message's order.

    Raises:
        DecodeError: If the message is malformed or a tensor contradicts itself.
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
    """Return ``head`` followed by named tensors in the field ``field``.

    Args:
        arrays: (name, array) pairs. An array may have any strides and is read in one pass.
        field: The number of the field that holds tensors.
        head: The serialized protobuf bytes of all other fields.

    Raises:
        InvalidInputError: If an array's dtype has no row in the dtype table, its rank is over 32,
            or the message would exceed 2**31 - 1 bytes.
    """
    tensors = []
    for name, array in arrays:
        row = of_array(array)
        # numpy exports no buffer for ml_dtypes' dtypes, so floats are passed as integers.
        bits = array.view(f"<u{row.itemsize}") if row.is_float else array
        tensors.append((name, row.number, bits.data))
    try:
        return codec.encode(tensors, field=field, head=head)
    except ValueError as error:
        raise InvalidInputError(str(error)) from None
