"""The packets on the socket of shared memory: 24 bytes each, little-endian.

| byte 0 | byte 1 | 2 to 7 | 8 to 15 | 16 to 23 | from | meaning |
| --- | --- | --- | --- | --- | --- | --- |
| 1 HELLO | version, 1 | 0 | ticket | ticket | client | the first packet: opens a session |
| 2 WELCOME | version, 1 | 0 | session | session | server | the session's id, for requests |
| 3 REGION | 1 reply, 2 input | 0 | number | bytes | server | a new region and its descriptor |
| 4 RETURN | 0 | 0 | number | generation | client | ends a lease |
| 5 BORROW | 0 | 0 | bytes | 0 | client | requests an input region of that size |
| 6 LENT | 0 | 0 | number | generation | server | the input region that is lent; 0, 0 for none |
| 7 FORGET | 0 | 0 | number | generation | server | not used again: unmap it and RETURN it |

A REGION packet precedes every packet and message that refers to the region, and is sent once per
region and client. The socket (SOCK_SEQPACKET) preserves the boundaries of packets; a packet of
another size ends the connection.
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
    """The first byte of a packet."""

    HELLO = 1
    WELCOME = 2
    REGION = 3
    RETURN = 4
    BORROW = 5
    LENT = 6
    FORGET = 7


class Packet(NamedTuple):
    """One packet; the table above explains its numbers."""

    kind: PacketKind
    first: int
    second: int
    flag: int = 0

    def pack(self) -> bytes:
        """Return the packet's bytes."""
        return _LAYOUT.pack(self.kind, self.flag, self.first, self.second)

    @classmethod
    def unpack(cls, data: bytes) -> Packet:
        """Parse a packet; raise ValueError if the bytes are not a packet."""
        if len(data) != PACKET_BYTES:
            raise ValueError(f"packet: got {len(data)} bytes, expected {PACKET_BYTES}")
        kind, flag, first, second = _LAYOUT.unpack(data)
        return cls(PacketKind(kind), first, second, flag)


def from_id(identifier: bytes) -> tuple[int, int]:
    """Return a ticket or a session's id as the two numbers of a packet."""
    first, second = _ID.unpack(identifier)
    return first, second


def to_id(packet: Packet) -> bytes:
    """Return the ticket or session's id in a packet: 16 bytes."""
    return _ID.pack(packet.first, packet.second)
