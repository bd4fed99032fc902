"""Hostile messages: random fields, and random changes to whole messages."""

from __future__ import annotations

from random import Random

from protowire import INT8, SCALAR, field, varint

MAX_DEPTH = 3
"""How many messages within messages are taken apart: tensors and images stand 1 deep."""

LENGTH_DELIMITED = 2
MAX_NUMBER = (1 << 29) - 1


def hostile_value(random: Random, wire_type: int, depth: int) -> bytes:
    """Return a value of a wire type, mostly well-formed, nested up to ``depth`` deep."""
    if wire_type == 0:
        values = [0, 1, 1, 2, 5, 6, 10, 127, 1 << 31, (1 << 32) + 5, 1 << 62, (1 << 64) - 1]
        return varint(random.choice(values), random.choice([*[1] * 16, 2, 5, 6, 10, 11]))
    if wire_type in {2, 3}:
        kind = random.randrange(8)
        if kind < 3 and depth:
            return random.choice([b"", SCALAR, SCALAR]) + hostile_fields(random, depth - 1)
        if kind < 5:
            return SCALAR if kind == 3 else INT8 + field(3, 0, b"\x02") + field(5, 2, b"ab")
        if kind == 5:
            return b"".join(hostile_value(random, 0, 0) for _ in range(random.randrange(3)))
        return random.randbytes(random.randrange(4))
    size = {1: 8, 5: 4}.get(wire_type, 0)
    return random.choice([bytes(size), random.randbytes(size), bytes([1, *bytes(size)])[:size]])


def hostile_fields(random: Random, depth: int) -> bytes:
    """Return a series of fields, mostly well-formed, with few numbers and every wire type."""
    out = b""
    for _ in range(random.randrange(5)):
        number = random.choice([*[1, 2] * 8, *[3, 4, 5, 6, 15] * 3, 0, MAX_NUMBER])
        wire_type = random.choice([*[2] * 24, *[0] * 8, *[3, 1, 5] * 2, 4, 6])
        out += field(number, wire_type, hostile_value(random, wire_type, depth))
        if wire_type == 3:
            out += field(random.choice([*[number] * 9, 15]), 4)
    return out


def hostile_message(random: Random) -> bytes:
    """Return a series of fields, some of them cut or with a byte changed."""
    message = bytearray(hostile_fields(random, 2))
    for _ in range(random.choice([0, 0, 0, 0, 1, 2])):
        if message:
            message[random.randrange(len(message))] = random.randrange(256)
    return bytes(message[: random.choice([*[None] * 8, -1, -2])])


def mutated(random: Random, message: bytes) -> bytes:
    """Return a message with a few changes, most of which keep it well-formed.

    Bytes changed at random mostly break a length that stands before them, and the decoder goes no
    further than that. So a change is made to a field, at any depth, and lengths are written anew.
    """
    for _ in range(random.choice([1, 1, 2, 3])):
        message = _changed(random, message, MAX_DEPTH)
    return message


def _changed(random: Random, message: bytes, depth: int) -> bytes:
    fields = split(message)
    if not fields or random.random() < 0.1:
        return _changed_bytes(random, message)
    index = random.randrange(len(fields))
    tag, value = fields[index]
    if tag & 7 == LENGTH_DELIMITED and depth and random.random() < 0.6:
        fields[index] = (tag, _changed(random, value, depth - 1))
    else:
        _change_field(random, fields, index)
    return join(random, fields)


def _change_field(random: Random, fields: list[tuple[int, bytes]], index: int) -> None:
    tag, value = fields[index]
    match random.randrange(7):
        case 0:
            del fields[index]
        case 1:
            fields.insert(random.randrange(len(fields) + 1), fields[index])
        case 2:
            fields.insert(index, fields.pop(random.randrange(len(fields))))
        case 3:
            fields[index] = (tag, hostile_value(random, tag & 7, 1))
        case 4:
            number = random.choice([*range(1, 7), *range(1, 7), 0, 15, MAX_NUMBER, MAX_NUMBER + 1])
            fields[index] = (number << 3 | tag & 7, value)
        case 5:
            fields[index] = (tag, _changed_bytes(random, value))
        case _:
            fields[index:index] = split(hostile_fields(random, 1)) or []


def _changed_bytes(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    new = random.choice([b"\0", b"\1", b"\2", b"\x7f", b"\x80", b"\xff", random.randbytes(1)])
    match random.randrange(3):
        case 0:
            return data[:at] + new + data[at + 1 :]
        case 1:
            return data[:at] + new + data[at:]
        case _:
            return data[:at] + data[at + random.randrange(9) :]


def split(message: bytes) -> list[tuple[int, bytes]] | None:
    """Return a message's fields as (tag, value) pairs; None for what is not easily taken apart.

    A group's begin and end are fields without a value.
    """
    fields = []
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        if tag & 7 == 0:
            end = _read_varint(message, at)[1]
        elif tag & 7 == LENGTH_DELIMITED:
            size, at = _read_varint(message, at)
            end = at + size
        else:
            end = at + {1: 8, 3: 0, 4: 0, 5: 4}.get(tag & 7, len(message) + 1)
        if end > len(message):
            return None
        fields.append((tag, message[at:end]))
        at = end
    return fields


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """Return a varint and where it ends; after the end of a message that cuts it off."""
    value = 0
    for index, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    return 0, len(message) + 1


def join(random: Random, fields: list[tuple[int, bytes]]) -> bytes:
    """Return a message of fields, sometimes with a varint that is longer than needed."""
    out = bytearray()
    sizes = [*[1] * 98, 5, 6]
    for tag, value in fields:
        out += varint(tag, random.choice(sizes))
        if tag & 7 == LENGTH_DELIMITED:
            out += varint(len(value), random.choice(sizes))
        out += value
    return bytes(out)
