"""layertap, with a client that does not use memory shared with the server."""

from __future__ import annotations

from contextlib import AbstractContextManager

from peers import layertap_peer
from peers.given import Ask

__all__ = ["connect"]


def connect(address: str) -> AbstractContextManager[Ask]:
    """Return what asks, on a connection of its own."""
    return layertap_peer.connect(address, shared_memory=False)
