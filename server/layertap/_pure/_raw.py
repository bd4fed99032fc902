"""Messages whose payloads are ``repeated bytes`` at the top level: laid out, and split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from layertap._pure._build import ReplyLayout
from layertap._pure._wire import (
    LENGTH_DELIMITED,
    MAX_MESSAGE_BYTES,
    MAX_MESSAGE_DEPTH,
    MAX_REST_FIELDS,
    Reader,
    check_field,
    int64,
    tag,
    varint,
)


def raw_layout(
    tensors: Iterable[tuple[int, Sequence[int]]], *, field: int, head_size: int
) -> ReplyLayout:
    """See ``layertap._core.raw_layout``."""
    layout = ReplyLayout([], field=field, head_size=head_size)
    for dtype, shape in tensors:
        # Laid out by itself, which checks it and gives its size.
        (slot,) = ReplyLayout([("", dtype, shape)], field=field, head_size=0)._slots
        header = tag(field, LENGTH_DELIMITED) + varint(slot.payload_size)
        begin = layout.nbytes + len(header)
        layout._slots.append(
            slot._replace(header_offset=layout.nbytes, header=header, payload_offset=begin)
        )
        layout._nbytes = begin + slot.payload_size
        if layout.nbytes > MAX_MESSAGE_BYTES:
            raise ValueError("message: larger than 2**31 - 1 bytes")
    return layout


def split(message: bytes, *, field: int, most: int) -> tuple[bytes, list[memoryview]]:
    """See ``layertap._core.split``."""
    if not isinstance(message, bytes):
        raise TypeError("message: expected bytes")
    field, most = int64(field), int64(most)
    check_field(field)
    if most < 0:
        raise ValueError(f"most: got {most}, expected from 0")
    if len(message) > MAX_MESSAGE_BYTES:
        raise ValueError("message: larger than 2**31 - 1 bytes")
    rest: list[bytes] = []
    payloads: list[memoryview] = []
    reader = Reader(message, 0, len(message))
    while not reader.done():
        start = reader.at
        number, wire_type = reader.field_tag()
        if (number, wire_type) == (field, LENGTH_DELIMITED):
            if len(payloads) == most:
                raise ValueError(f"message: more than {most} of field {field}")
            begin, end = reader.length_delimited()
            payloads.append(memoryview(message)[begin:end])
        else:
            reader.skip(number, wire_type, MAX_MESSAGE_DEPTH)
            rest.append(message[start : reader.at])
            if len(rest) > MAX_REST_FIELDS:
                raise ValueError(f"message: more than {MAX_REST_FIELDS} fields")
    return b"".join(rest), payloads
