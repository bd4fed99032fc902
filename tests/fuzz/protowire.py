"""Protobuf's wire format by hand, including forms that no library writes."""

from __future__ import annotations

from layertap.v1.tensor_pb2 import DATA_TYPE_INT8


def varint(value: int, size: int = 1) -> bytes:
    """Return a varint of at least ``size`` bytes, overlong if that is more than needed."""
    out = bytearray()
    while value >= 0x80 or len(out) + 1 < size:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, wire_type: int, value: bytes = b"") -> bytes:
    """Return a field: its tag and the bytes given; a length in front of them for wire type 2."""
    length = varint(len(value)) if wire_type == 2 else b""
    return varint(number << 3 | wire_type) + length + value


def groups(depth: int) -> bytes:
    """Return ``depth`` groups of field 15, one in the other."""
    return field(15, 3) * depth + field(15, 4) * depth


INT8 = field(2, 0, varint(DATA_TYPE_INT8))
SCALAR = INT8 + field(5, 2, b"\x07")
