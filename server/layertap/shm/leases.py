"""Leases: which client has which region, and what that means while bytes are being moved."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

from layertap.shm.regions import Region

__all__ = ["Channel", "End", "Lease", "Loan", "Session"]


class Channel(Protocol):
    """The server's end of one client's socket. Nothing in it waits."""

    def poll(self) -> None:
        """Take what the client has said already, such as that it gives regions back."""

    def announce(self, region: Region) -> bool:
        """Hand a region's file descriptor over; False where the client can't take it now."""

    def forget(self, number: int, generation: int) -> None:
        """Say that a region will not be used again."""

    def close(self) -> None:
        """End the connection."""


class End(Enum):
    """What becomes of a lease's region."""

    REUSE = auto()
    """The client is gone, or has said that it needs it no more."""
    RETIRE = auto()
    """The client may still look at it."""


class Lease:
    """One region that is lent to one session.

    Attributes:
        region: The region.
        generation: The region's, when it was lent.
        session: Whose it is.
        since: When it was lent or used last.
        users: How many of the server's threads move bytes in or out.
        ended: What becomes of the region once no bytes are moved any more; None while it is lent.
        retired: Whether the server has let go of the region, and only counts its bytes.
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
        id: 16 secret bytes that only its socket told it.
        channel: The server's end of its socket.
        leases: What is lent to it, by the region's number.
        known: The regions whose descriptors it has, each with the last lease that was its own.
        held: Bytes that are lent to it, or were retired and not given back.
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
    """A reply region to write into. Dropped without ``publish``, it goes back to the pool.

    Whoever writes to ``buffer`` keeps the loan, so that nobody gets the region meanwhile.

    Attributes:
        buffer: The region's memory, writable.
        nbytes: How much of it was asked for.
        region: The region's number.
        generation: Which lease of it this is.
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
        # Called by the garbage collector, in whatever thread and under whatever lock.
        self._dropped = weakref.finalize(self, dropped, lease)
        self._dropped.atexit = False

    def publish(self) -> None:
        """Leave the region to the client, once all is written and before the reply is sent."""
        if self._dropped.detach() is not None:
            self._publish(self._lease, self.nbytes)
            self.buffer = memoryview(b"")
