"""What the socket of shared memory carries: packets of 24 bytes, little-endian.

| byte 0 | byte 1 | 2 to 7 | 8 to 15 | 16 to 23 | from | what it says |
| --- | --- | --- | --- | --- | --- | --- |
| 1 HELLO | version, 1 | 0 | ticket | ticket | client | first of all: here I am |
| 2 WELCOME | version, 1 | 0 | session | session | server | the session to name in requests |
| 3 REGION | 1 reply, 2 input | 0 | number | bytes | server | with the file descriptor |
| 4 RETURN | 0 | 0 | number | generation | client | the lease is not needed any more |
| 5 BORROW | 0 | 0 | bytes | 0 | client | an input region of so many bytes, please |
| 6 LENT | 0 | 0 | number | generation | server | it is this one; 0, 0 for none |
| 7 FORGET | 0 | 0 | number | generation | server | will not be used again: unmap, RETURN |

A REGION comes before whatever refers to it, in the socket's order; once for a region and client.
A socket of packets (SOCK_SEQPACKET) keeps their bounds; one of any other size ends the connection.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

__all__ = ["PACKET_BYTES", "VERSION", "Packet", "PacketKind", "from_id", "to_id"]

VERSION = 1
_LAYOUT = struct.Struct("<BB6xQQ")
_ID = struct.Struct("<QQ")
PACKET_BYTES = _LAYOUT.size


class PacketKind(IntEnum):
    """The first byte."""

    HELLO = 1
    WELCOME = 2
    REGION = 3
    RETURN = 4
    BORROW = 5
    LENT = 6
    FORGET = 7


class Packet(NamedTuple):
    """One packet; the table above says what its numbers are."""

    kind: PacketKind
    first: int
    second: int
    flag: int = 0

    def pack(self) -> bytes:
        """Return its bytes."""
        return _LAYOUT.pack(self.kind, self.flag, self.first, self.second)

    @classmethod
    def unpack(cls, data: bytes) -> Packet:
        """Read a packet; raise ValueError for bytes that are none."""
        if len(data) != PACKET_BYTES:
            raise ValueError(f"packet: got {len(data)} bytes, expected {PACKET_BYTES}")
        kind, flag, first, second = _LAYOUT.unpack(data)
        return cls(PacketKind(kind), first, second, flag)


def from_id(identifier: bytes) -> tuple[int, int]:
    """Return a ticket or session as the two numbers of a packet."""
    first, second = _ID.unpack(identifier)
    return first, second


def to_id(packet: Packet) -> bytes:
    """Return the ticket or session that a packet bears: 16 bytes."""
    return _ID.pack(packet.first, packet.second)
