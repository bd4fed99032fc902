"""Leases: which client has which region, and how a lease ends while its region is in use."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

from layertap.shm.regions import Region

__all__ = ["Channel", "End", "Lease", "Loan", "Session"]


class Channel(Protocol):
    """The server's end of one client's socket. None of its methods block."""

    def poll(self) -> None:
        """Handle packets that the client has already sent, such as returned regions."""

    def announce(self, region: Region) -> bool:
        """Send a region's file descriptor; return False if the client can't take it now."""

    def forget(self, number: int, generation: int) -> None:
        """Tell the client that a region won't be used again."""

    def close(self) -> None:
        """End the connection."""


class End(Enum):
    """What happens to a region when its lease ends."""

    REUSE = auto()
    """The client has left or has returned the region: it may be lent again."""
    RETIRE = auto()
    """The client may still read it: it is never lent again."""


class Lease:
    """The lease of one region to one session.

    Attributes:
        region: The region.
        generation: The region's generation when it was lent.
        session: The session that has it.
        since: When it was lent or last used.
        users: The number of server threads that are copying bytes in or out.
        ended: What happens to the region after these threads have finished; None while it is lent.
        retired: Whether the server has closed the region and only counts its bytes.
    """

    __slots__ = ("ended", "generation", "region", "retired", "session", "since", "users")

    def __init__(self, region: Region, session: Session, since: float) -> None:
        region.generation += 1
        self.region = region
        self.session = session
        self.generation = region.generation
        self.since = since
        self.users = 0
        self.ended: End | None = None
        self.retired = False


class Session:
    """One client.

    Attributes:
        id: 16 secret bytes that only the client at the other end of the socket knows.
        channel: The server's end of its socket.
        leases: Its leases, by the region's number.
        known: The numbers of the regions whose descriptors it has, each with the generation of the
            region's last lease to it.
        held: The bytes of regions that are lent to it, or are retired and not yet returned.
        closed: Whether it has ended.
    """

    def __init__(self, identifier: bytes, channel: Channel) -> None:
        self.id = identifier
        self.channel = channel
        self.leases: dict[int, Lease] = {}
        self.known: dict[int, int] = {}
        self.held = 0
        self.closed = False


class Loan:
    """A reply region to write to. Dropped without ``publish``, it goes back to the pool.

    Code that writes to ``buffer`` must keep the loan, so that the region is not lent meanwhile.

    Attributes:
        buffer: The region's memory, writable.
        nbytes: The bytes that were requested.
        region: The region's number.
        generation: The generation of this lease.
    """

    def __init__(
        self,
        lease: Lease,
        nbytes: int,
        publish: Callable[[Lease, int], None],
        dropped: Callable[[Lease], None],
    ) -> None:
        self.buffer = lease.region.memory[:nbytes]
        self.nbytes = nbytes
        self.region = lease.region.number
        self.generation = lease.generation
        self._lease = lease
        self._publish = publish
        # The garbage collector may call this in any thread, while any lock is held.
        self._dropped = weakref.finalize(self, dropped, lease)
        self._dropped.atexit = False

    def publish(self) -> None:
        """Hand the region to the client, after writing everything and before sending the reply."""
        if self._dropped.detach() is not None:
            self._publish(self._lease, self.nbytes)
            self.buffer = memoryview(b"")
