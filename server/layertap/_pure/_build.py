"""Messages with tensors, laid out and built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from threading import Lock
from typing import NamedTuple, final

import numpy as np
from typing_extensions import Buffer

from layertap._pure._elements import FLOATS, NUMPY, cast_payload
from layertap._pure._wire import (
    LENGTH_DELIMITED,
    MAX_MESSAGE_BYTES,
    MAX_RANK,
    VARINT,
    bytes_field,
    check_field,
    int64,
    payload_bytes,
    tag,
    varint,
)

_ALIGNMENT, _RESIDUE = 64, 16
_NAME, _DTYPE, _SHAPE, _PADDING, _DATA = 1, 2, 3, 4, 5


class _Slot(NamedTuple):
    dtype: int
    shape: tuple[int, ...]
    header_offset: int
    header: bytes
    payload_offset: int
    payload_size: int


@final
class ReplyLayout:
    """See ``layertap._core.ReplyLayout``."""

    def __init__(
        self, tensors: Iterable[tuple[str, int, Sequence[int]]], *, field: int, head_size: int
    ) -> None:
        field, head_size = int64(field), int64(head_size)
        check_field(field)
        if not 0 <= head_size <= MAX_MESSAGE_BYTES:
            raise ValueError(f"head_size: got {head_size}, expected 0 to 2**31 - 1")
        self._head_size = head_size
        self._slots: list[_Slot] = []
        self._nbytes = head_size
        for name, dtype, shape in tensors:
            slot = _slot(name, int64(dtype), tuple(map(int64, shape)), field, self._nbytes)
            self._slots.append(slot)
            self._nbytes = slot.payload_offset + slot.payload_size
            if self._nbytes > MAX_MESSAGE_BYTES:
                raise ValueError("message: larger than 2**31 - 1 bytes")

    @property
    def nbytes(self) -> int:
        """Bytes of the finished message, head included."""
        return self._nbytes

    def __len__(self) -> int:
        return len(self._slots)


@final
class ReplyBuilder:
    """See ``layertap._core.ReplyBuilder``."""

    def __init__(self, layout: ReplyLayout) -> None:
        if not isinstance(layout, ReplyLayout):
            raise TypeError("layout: expected a ReplyLayout")
        self._layout = layout
        self._message = bytearray(layout.nbytes)
        for slot in layout._slots:
            self._message[slot.header_offset : slot.payload_offset] = slot.header
        self._written: set[int] = set()
        self._writing: set[int] = set()
        self._finished = False
        self._lock = Lock()

    def write(self, index: int, array: Buffer, dtype: int) -> None:
        """See ``layertap._core.ReplyBuilder.write``."""
        index, view, dtype = int64(index), memoryview(array), int64(dtype)
        self._check_open()
        slot = self._checked_slot(index, view, dtype)
        with self._lock:
            self._check_open()
            if index in self._writing:
                raise ValueError(f"tensor {index}: being written by another thread")
            self._writing.add(index)
        try:
            payload = np.frombuffer(
                self._message, np.uint8, count=slot.payload_size, offset=slot.payload_offset
            )
            payload[...] = cast_payload(view, dtype, slot.dtype)
            self._written.add(index)
        finally:
            self._writing.discard(index)

    def finish(self, head: bytes) -> bytes:
        """See ``layertap._core.ReplyBuilder.finish``."""
        if not isinstance(head, bytes):
            raise TypeError("head: expected bytes")
        with self._lock:
            self._check_open()
            expected = self._layout._head_size
            if len(head) != expected:
                raise ValueError(f"head: got {len(head)} bytes, expected {expected}")
            if self._writing:
                raise ValueError("builder: a write is in flight")
            for index in range(len(self._layout)):
                if index not in self._written:
                    raise ValueError(f"tensor {index}: never written")
            self._finished = True
        self._message[: len(head)] = head
        message, self._message = bytes(self._message), bytearray()
        return message

    def _check_open(self) -> None:
        if self._finished:
            raise ValueError("builder: finished already")

    def _checked_slot(self, index: int, view: memoryview, dtype: int) -> _Slot:
        slots = self._layout._slots
        if not 0 <= index < len(slots):
            raise IndexError(f"tensor {index}: expected 0 to {len(slots)} less 1")
        slot = slots[index]
        if dtype not in NUMPY:
            raise ValueError(f"tensor {index}: dtype: got {dtype}, not a DataType")
        if view.itemsize != NUMPY[dtype].itemsize:
            raise ValueError(
                f"tensor {index}: item size: got {view.itemsize}, "
                f"expected {NUMPY[dtype].itemsize} for {NUMPY[dtype].name}"
            )
        if view.shape != slot.shape:
            raise ValueError(
                f"tensor {index}: shape: got {list(view.shape or ())}, expected {list(slot.shape)}"
            )
        if dtype != slot.dtype and not {dtype, slot.dtype} <= FLOATS:
            names = NUMPY[dtype].name, NUMPY[slot.dtype].name
            raise ValueError(f"tensor {index}: no cast from {names[0]} to {names[1]}")
        return slot


def encode(tensors: Iterable[tuple[str, int, Buffer]], *, field: int, head: bytes) -> bytes:
    """See ``layertap._core.encode``."""
    views = [(name, dtype, memoryview(array)) for name, dtype, array in tensors]
    layout = ReplyLayout(
        [(name, dtype, view.shape or ()) for name, dtype, view in views],
        field=field,
        head_size=len(head),
    )
    builder = ReplyBuilder(layout)
    for index, (_, dtype, view) in enumerate(views):
        builder.write(index, view, dtype)
    return builder.finish(head)


def _slot(name: str, dtype: int, shape: tuple[int, ...], field: int, offset: int) -> _Slot:
    if dtype not in NUMPY:
        raise ValueError(f"dtype: got {dtype}, not a DataType")
    if len(shape) > MAX_RANK:
        raise ValueError(f"shape: got rank {len(shape)}, expected at most 32")
    size = payload_bytes(shape, NUMPY[dtype].itemsize)
    if size is None:
        raise ValueError("shape: got a negative size or one that overflows")
    if size > MAX_MESSAGE_BYTES:
        raise ValueError("message: larger than 2**31 - 1 bytes")
    opening = tag(field, LENGTH_DELIMITED)
    small = bytes_field(_NAME, name.encode()) + tag(_DTYPE, VARINT) + varint(dtype)
    small += bytes_field(_SHAPE, b"".join(map(varint, shape)))
    data = tag(_DATA, LENGTH_DELIMITED) + varint(size)
    # The submessage's length takes part in where the payload lands, so paddings are tried.
    for zeros in range(-1, 128):
        padding = b"" if zeros < 0 else tag(_PADDING, 2) + varint(zeros) + bytes(zeros)
        body = small + padding + data
        header = opening + varint(len(body) + size) + body
        if (offset + len(header)) % _ALIGNMENT == _RESIDUE:
            return _Slot(dtype, shape, offset, header, offset + len(header), size)
    raise AssertionError("128 paddings in a row reach every residue")
