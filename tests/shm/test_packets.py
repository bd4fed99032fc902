"""Packets are read as they were written; malformed ones are refused."""

from __future__ import annotations

import pytest

from layertap.shm.packets import PACKET_BYTES, Packet, PacketKind, from_id, to_id


@pytest.mark.parametrize("kind", PacketKind)
def test_packets_survive_the_wire(kind: PacketKind) -> None:
    """Kind, 64-bit numbers and flag are unchanged after encoding to 24 bytes and decoding."""
    packet = Packet(kind, 1, (1 << 64) - 1, 255)
    assert len(packet.pack()) == PACKET_BYTES == 24
    assert Packet.unpack(packet.pack()) == packet


def test_ids_travel_as_two_numbers() -> None:
    """The 16 bytes of a ticket or session are unchanged after conversion to two numbers."""
    identifier = bytes(range(16))
    packet = Packet(PacketKind.HELLO, *from_id(identifier), 1)
    assert to_id(Packet.unpack(packet.pack())) == identifier
    assert packet.pack()[8:] == identifier


@pytest.mark.parametrize("data", [b"", bytes(24), b"\x08" + bytes(23), bytes(23), b"\1" * 25])
def test_what_is_no_packet_is_refused(data: bytes) -> None:
    """Bytes of another size or with an unknown kind raise ValueError."""
    with pytest.raises(ValueError, match=r"packet: got|not a valid PacketKind"):
        Packet.unpack(data)
