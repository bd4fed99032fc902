"""Protobuf's wire format: tags, varints and a bounded reader."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Final

MAX_RANK: Final[int] = 32
MAX_MESSAGE_BYTES: Final[int] = 2**31 - 1

MAX_MESSAGE_DEPTH = 100
MAX_REST_FIELDS = 1 << 16
VARINT, FIXED64, LENGTH_DELIMITED, START_GROUP, END_GROUP, FIXED32 = range(6)


class Reader:
    """A cursor over ``message[at:end]``; every method raises ValueError on malformed bytes."""

    def __init__(self, message: bytes, at: int, end: int) -> None:
        self._message = message
        self.at = at
        self._end = end

    def done(self) -> bool:
        return self.at == self._end

    def tag(self) -> tuple[int, int]:
        tag = self.varint(max_bytes=5)
        if tag >= 1 << 32:
            raise ValueError("message: tag of more than 32 bits")
        return tag >> 3, tag & 7

    def field_tag(self) -> tuple[int, int]:
        number, wire_type = self.tag()
        if number == 0:
            raise ValueError("message: field number 0")
        return number, wire_type

    def varint(self, max_bytes: int = 10) -> int:
        value = 0
        for index in range(max_bytes):
            self._advance(1)
            byte = self._message[self.at - 1]
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                return value & (2**64 - 1)
        raise ValueError("message: varint with too many bytes")

    def fixed64(self) -> int:
        begin = self.at
        self._advance(8)
        return int.from_bytes(self._message[begin : self.at], "little")

    def length_delimited(self) -> tuple[int, int]:
        size = self.varint(max_bytes=5)
        begin = self.at
        self._advance(size)
        return begin, self.at

    def skip(self, number: int, wire_type: int, depth: int) -> None:
        if wire_type == VARINT:
            self.varint()
        elif wire_type == FIXED64:
            self._advance(8)
        elif wire_type == LENGTH_DELIMITED:
            self.length_delimited()
        elif wire_type == START_GROUP:
            self._skip_group(number, depth)
        elif wire_type == FIXED32:
            self._advance(4)
        elif wire_type == END_GROUP:
            raise ValueError("message: end of a group that was not begun")
        else:
            raise ValueError("message: invalid wire type")

    def _skip_group(self, number: int, depth: int) -> None:
        if depth < 1:
            raise ValueError("message: groups nested too deep")
        while True:
            inner, wire_type = self.tag()
            if wire_type == END_GROUP:
                if inner != number:
                    raise ValueError("message: group ended by another's end")
                return
            self.skip(inner, wire_type, depth - 1)

    def _advance(self, size: int) -> None:
        if size > self._end - self.at:
            raise ValueError("message: truncated")
        self.at += size


def payload_bytes(shape: Sequence[int], itemsize: int) -> int | None:
    """Return the bytes of a dense tensor; None for a negative size or an overflow."""
    if any(size < 0 for size in shape):
        return None
    if itemsize * math.prod(size for size in shape if size) >= 1 << 63:
        return None
    return itemsize * math.prod(shape)


def int64(value: int) -> int:
    value = operator.index(value)
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError("integer of more than 64 bits")
    return value


def check_field(field: int) -> None:
    if not 1 <= field < 1 << 29:
        raise ValueError(f"field: got {field}, expected 1 to 2**29 - 1")


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def tag(field: int, wire_type: int) -> bytes:
    return varint(field << 3 | wire_type)


def bytes_field(field: int, value: bytes) -> bytes:
    return tag(field, LENGTH_DELIMITED) + varint(len(value)) + value if value else b""
