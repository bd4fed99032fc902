"""Messages with tensors, split; see ``layertap._core.decode``."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from layertap._pure._elements import BOOL, NUMPY
from layertap._pure._wire import (
    FIXED64,
    LENGTH_DELIMITED,
    MAX_MESSAGE_BYTES,
    MAX_MESSAGE_DEPTH,
    MAX_RANK,
    MAX_REST_FIELDS,
    Reader,
    check_field,
    int64,
    payload_bytes,
    signed,
)

_Slice = tuple[int, int, int, int]


def decode(
    message: bytes, *, field: int, most: int = MAX_MESSAGE_BYTES, counted: Iterable[int] = ()
) -> tuple[bytes, list[tuple[str, int, tuple[int, ...], memoryview | _Slice]]]:
    """See ``layertap._core.decode``."""
    if not isinstance(message, bytes):
        raise TypeError("message: expected bytes")
    field, most, counted_fields = int64(field), int64(most), {int64(each) for each in counted}
    for number in (field, *counted_fields):
        check_field(number)
    if most < 0:
        raise ValueError(f"most: got {most}, expected from 0")
    if len(message) > MAX_MESSAGE_BYTES:
        raise ValueError("message: larger than 2**31 - 1 bytes")
    rest: list[bytes] = []
    found: list[tuple[str, int, tuple[int, ...], memoryview | _Slice]] = []
    others = 0
    reader = Reader(message, 0, len(message))
    while not reader.done():
        begin = reader.at
        number, wire_type = reader.field_tag()
        if (number, wire_type) == (field, LENGTH_DELIMITED):
            span = reader.length_delimited()
            if len(found) == most:
                raise ValueError(f"message: more than {most} tensors")
            tensor = _Tensor(message)
            tensor.merge(*span)
            found.append(tensor.checked())
            continue
        others += 1
        if wire_type == LENGTH_DELIMITED and number in counted_fields:
            others += _fields(message, *reader.length_delimited())
        else:
            reader.skip(number, wire_type, MAX_MESSAGE_DEPTH)
        rest.append(message[begin : reader.at])
        if others > MAX_REST_FIELDS:
            raise ValueError(f"message: more than {MAX_REST_FIELDS} fields")
    return b"".join(rest), found


def _fields(message: bytes, begin: int, end: int) -> int:
    """Return the number of fields in a submessage."""
    reader = Reader(message, begin, end)
    count = 0
    while not reader.done():
        reader.skip(*reader.field_tag(), MAX_MESSAGE_DEPTH - 1)
        count += 1
    return count


class _Tensor:
    """One ``layertap.v1.Tensor`` that is being read."""

    def __init__(self, message: bytes) -> None:
        self._message = message
        self._name = ""
        self._dtype = 0
        self._shape: list[int] = []
        self._data = (0, 0)
        self._slice: list[int] | None = None

    def merge(self, begin: int, end: int) -> None:
        """Read the fields in a span of the message; they replace earlier values."""
        reader = Reader(self._message, begin, end)
        while not reader.done():
            match reader.field_tag():
                case (1, 2):
                    start, stop = reader.length_delimited()
                    try:
                        self._name = self._message[start:stop].decode()
                    except UnicodeDecodeError:
                        raise ValueError("tensor: name is not UTF-8") from None
                case (2, 0):
                    self._dtype = signed(reader.varint(), 32)
                case (3, 0):
                    self._shape.append(signed(reader.varint(), 64))
                case (3, 2):
                    sizes = Reader(self._message, *reader.length_delimited())
                    while not sizes.done():
                        self._shape.append(signed(sizes.varint(), 64))
                case (5, 2):
                    self._data = reader.length_delimited()
                case (6, 2):
                    self._merge_slice(*reader.length_delimited())
                case (number, wire_type):
                    reader.skip(number, wire_type, MAX_MESSAGE_DEPTH - 1)

    def _merge_slice(self, begin: int, end: int) -> None:
        self._slice = self._slice or [0, 0, 0, 0]
        reader = Reader(self._message, begin, end)
        while not reader.done():
            number, wire_type = reader.field_tag()
            if wire_type == FIXED64 and number <= 4:
                self._slice[number - 1] = reader.fixed64()
            else:
                reader.skip(number, wire_type, MAX_MESSAGE_DEPTH - 2)

    def checked(self) -> tuple[str, int, tuple[int, ...], memoryview | _Slice]:
        """Return the tensor; raise ValueError if it contradicts itself."""
        if self._dtype not in NUMPY:
            raise ValueError(f"tensor: dtype: got {self._dtype}, not a DataType")
        if len(self._shape) > MAX_RANK:
            raise ValueError(f"tensor: shape: got rank {len(self._shape)}, expected at most 32")
        expected = payload_bytes(self._shape, NUMPY[self._dtype].itemsize)
        if expected is None:
            raise ValueError("tensor: shape: got a negative size or one that overflows")
        begin, end = self._data
        if self._slice is not None:
            region, generation, offset, size = self._slice
            if end > begin:
                raise ValueError("tensor: got both data and shared")
            if size != expected:
                raise ValueError(f"tensor: shared: got {size} bytes, expected {expected}")
            return self._name, self._dtype, tuple(self._shape), (region, generation, offset, size)
        if end - begin != expected:
            raise ValueError(f"tensor: data: got {end - begin} bytes, expected {expected}")
        data = memoryview(self._message)[begin:end]
        if self._dtype == BOOL:
            _check_bools(data)
        return self._name, self._dtype, tuple(self._shape), data


def _check_bools(data: memoryview) -> None:
    stray = np.frombuffer(data, np.uint8) > 1
    if stray.any():
        at = int(stray.argmax())
        raise ValueError(
            f"tensor: data: got byte {data[at]} at position {at} of a bool tensor, expected 0 or 1"
        )
