"""Messages with tensors, laid out and built."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from threading import Lock
from typing import NamedTuple, final

import numpy as np
from typing_extensions import Buffer

from layertap._pure._elements import FLOATS, NUMPY, cast_payload
from layertap._pure._wire import (
    FIXED64,
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
_NAME, _DTYPE, _SHAPE, _PADDING, _DATA, _SHARED = 1, 2, 3, 4, 5, 6
_REGION, _GENERATION, _OFFSET, _SIZE = 1, 2, 3, 4


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
        self,
        tensors: Iterable[tuple[str, int, Sequence[int]]],
        *,
        field: int,
        head_size: int,
        apart: bool = False,
    ) -> None:
        field, head_size = int64(field), int64(head_size)
        check_field(field)
        if not 0 <= head_size <= MAX_MESSAGE_BYTES:
            raise ValueError(f"head_size: got {head_size}, expected 0 to 2**31 - 1")
        self._head_size = head_size
        self._slots: list[_Slot] = []
        self._nbytes = head_size
        self._apart = apart
        self._payload_nbytes = 0
        for name, dtype, shape in tensors:
            self._add_slot(name, int64(dtype), tuple(map(int64, shape)), field)
            if self._nbytes + self._payload_nbytes > MAX_MESSAGE_BYTES:
                raise ValueError("message: larger than 2**31 - 1 bytes")

    def _add_slot(self, name: str, dtype: int, shape: tuple[int, ...], field: int) -> None:
        if self._apart:
            begin = -(-self._payload_nbytes // _ALIGNMENT) * _ALIGNMENT
            slot = _slot_apart(name, dtype, shape, field, offset=self._nbytes, begin=begin)
            self._nbytes += len(slot.header)
            self._payload_nbytes = begin + slot.payload_size
        else:
            slot = _slot(name, dtype, shape, field, self._nbytes)
            self._nbytes = slot.payload_offset + slot.payload_size
        self._slots.append(slot)

    @property
    def nbytes(self) -> int:
        """Bytes of the finished message, including the head."""
        return self._nbytes

    @property
    def payload_nbytes(self) -> int:
        """Bytes of the separate buffer for payloads; 0 if they are in the message."""
        return self._payload_nbytes

    def __len__(self) -> int:
        return len(self._slots)


@final
class ReplyBuilder:
    """See ``layertap._core.ReplyBuilder``."""

    def __init__(
        self,
        layout: ReplyLayout,
        payloads: Buffer | None = None,
        *,
        region: int = 0,
        generation: int = 0,
    ) -> None:
        if not isinstance(layout, ReplyLayout):
            raise TypeError("layout: expected a ReplyLayout")
        if layout._apart != (payloads is not None):
            raise ValueError(
                "payloads: expected a buffer where the layout is apart, and only there"
            )
        self._layout = layout
        self._message = bytearray(layout.nbytes)
        self._payloads = (
            self._message if payloads is None else _writable(payloads, layout.payload_nbytes)
        )
        where = _fixed64(_REGION, region) + _fixed64(_GENERATION, generation)
        for slot in layout._slots:
            header = slot.header[: -len(where)] + where if layout._apart else slot.header
            self._message[slot.header_offset : slot.header_offset + len(header)] = header
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
                self._payloads, np.uint8, count=slot.payload_size, offset=slot.payload_offset
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
        message = bytes(self._message)
        self._message = self._payloads = bytearray()
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


def _writable(payloads: Buffer, needed: int) -> memoryview:
    view = memoryview(payloads)
    if view.readonly or not view.c_contiguous:
        raise BufferError("payloads: expected a writable, contiguous buffer")
    if view.nbytes < needed:
        raise ValueError(f"payloads: got {view.nbytes} bytes, expected {needed}")
    return view.cast("B")


def _fixed64(field: int, value: int) -> bytes:
    return tag(field, FIXED64) + struct.pack("<Q", value)


def _small_fields(name: str, dtype: int, shape: tuple[int, ...]) -> bytes:
    small = bytes_field(_NAME, name.encode()) + tag(_DTYPE, VARINT) + varint(dtype)
    return small + bytes_field(_SHAPE, b"".join(map(varint, shape)))


def _payload_size(dtype: int, shape: tuple[int, ...]) -> int:
    if dtype not in NUMPY:
        raise ValueError(f"dtype: got {dtype}, not a DataType")
    if len(shape) > MAX_RANK:
        raise ValueError(f"shape: got rank {len(shape)}, expected at most 32")
    size = payload_bytes(shape, NUMPY[dtype].itemsize)
    if size is None:
        raise ValueError("shape: got a negative size or one that overflows")
    if size > MAX_MESSAGE_BYTES:
        raise ValueError("message: larger than 2**31 - 1 bytes")
    return size


def _slot_apart(
    name: str, dtype: int, shape: tuple[int, ...], field: int, *, offset: int, begin: int
) -> _Slot:
    size = _payload_size(dtype, shape)
    slots = _fixed64(_SIZE, size) + _fixed64(_OFFSET, begin)
    # Region and generation come last, so that the builder can fill them in.
    slots += _fixed64(_REGION, 0) + _fixed64(_GENERATION, 0)
    body = _small_fields(name, dtype, shape) + bytes_field(_SHARED, slots)
    header = tag(field, LENGTH_DELIMITED) + varint(len(body)) + body
    return _Slot(dtype, shape, offset, header, begin, size)


def _slot(name: str, dtype: int, shape: tuple[int, ...], field: int, offset: int) -> _Slot:
    size = _payload_size(dtype, shape)
    opening = tag(field, LENGTH_DELIMITED)
    small = _small_fields(name, dtype, shape)
    data = tag(_DATA, LENGTH_DELIMITED) + varint(size)
    # The padding changes the submessage's length, whose own size affects the offset: so try.
    for zeros in range(-1, 128):
        padding = b"" if zeros < 0 else tag(_PADDING, 2) + varint(zeros) + bytes(zeros)
        body = small + padding + data
        header = opening + varint(len(body) + size) + body
        if (offset + len(header)) % _ALIGNMENT == _RESIDUE:
            return _Slot(dtype, shape, offset, header, offset + len(header), size)
    raise AssertionError("128 paddings in a row reach every residue")
