"""The server's shared memory: sessions, the regions lent to them, and how regions come back.

Note [Nobody's arrays change]
    Nothing writes to a region while it is lent. It is reused once its client has returned it or has
    left. If the lease time passes, or the server ends the session itself, the client may still read
    the region, so the server closes it and never reuses it. Its bytes count towards the limit and
    the client's share until the client returns it or leaves. A lease doesn't end while a server
    thread copies bytes of its region.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from layertap.errors import InvalidInputError, SharedMemoryLostError
from layertap.shm.leases import Channel, End, Lease, Loan, Session
from layertap.shm.pool import MOST_REGIONS, Pool, size_class
from layertap.shm.regions import Region, RegionKind, make_region
from layertap.wire.tensors import SharedSlice, SharedTensor, TensorView

__all__ = [
    "DEFAULT_LEASE_SECONDS",
    "DEFAULT_SHARED_MIB",
    "FALLBACK_REASONS",
    "LEAST_BYTES",
    "SessionMemory",
    "SharedMemory",
    "SharedMemoryState",
    "read_input",
]

DEFAULT_SHARED_MIB = 1024
DEFAULT_LEASE_SECONDS = 60.0

FALLBACK_REASONS = ("session", "share", "limit", "socket", "system")
"""Why a reply is sent through the network instead: its session is unknown, the client's share or
the total limit is reached, the client accepts no descriptor, the system can't make a region."""

LEAST_BYTES = 256 * 1024
"""Smaller tensors are at least as fast in the message; see docs/decisions/0008-shared-memory.md."""

_SESSIONS = 64


@dataclass(frozen=True, slots=True)
class SharedMemoryState:
    """The state of shared memory at one moment.

    Attributes:
        limit: Maximum bytes of all regions together.
        sessions: The number of clients.
        bytes: The bytes of regions by state: ``leased``, ``input``, ``retired`` and ``free``.
        regions: The number of regions by state.
        fallbacks: The number of replies that were sent through the network instead, by reason.
        reply_bytes: The bytes of all replies through shared memory, since the start.
    """

    limit: int
    sessions: int
    bytes: Mapping[str, int]
    regions: Mapping[str, int]
    fallbacks: Mapping[str, int]
    reply_bytes: int


@dataclass(frozen=True, slots=True)
class SessionMemory:
    """The shared memory of one client's session.

    Attributes:
        memory: The server's shared memory.
        session: The client's session.
        least: Size in bytes from which a reply is faster through shared memory.
    """

    memory: SharedMemory
    session: Session
    least: int = LEAST_BYTES

    @classmethod
    def find(cls, memory: SharedMemory | None, identifier: bytes) -> SessionMemory | None:
        """Return the memory of the session that a request names; None if there is no such session.

        Args:
            memory: The server's shared memory; None if it has none.
            identifier: The session's id; empty if the request names none.
        """
        if memory is None or not identifier:
            return None
        session = memory.session(identifier)
        return cls(memory, session) if session else None

    def lend(self, nbytes: int) -> Loan | None:
        """Lend a region for a reply of ``nbytes`` bytes; return None if the reply must be sent."""
        return self.memory.lend(self.session, nbytes) if nbytes >= self.least else None


def read_input(
    tensor: SharedTensor,
    memory: SessionMemory | None,
    most: int,
    admit: Callable[[int], object],
) -> TensorView:
    """Return a private copy of a request's tensor in shared memory.

    Args:
        tensor: The request's description of the tensor.
        memory: The memory of the request's session; None if it has no session.
        most: Maximum bytes of an input.
        admit: Called with the bytes of the copy before it is made.

    Raises:
        OverloadedError: If ``admit`` raises it.
        SharedMemoryLostError: If the memory isn't lent to the request's session.
        InvalidInputError: If the bytes are outside the region, or too many.
        DecodeError: If a byte of a bool tensor is neither 0 nor 1.
    """
    if memory is None:
        raise SharedMemoryLostError("shared_memory_session: got none that this server knows")
    if tensor.at.size > most:
        raise InvalidInputError(f"shared: got {tensor.at.size} bytes, expected at most {most}")
    admit(tensor.at.size)
    return tensor.view(memory.memory.read(memory.session, tensor.at))


class SharedMemory:
    """Lends regions to clients. Safe to share between threads; its locks are held briefly.

    Args:
        limit: Maximum bytes of all regions together; one client may have half of them.
        lease_seconds: How long a client may keep a region, and how long an unused one is kept.
        regions: Maximum number of regions; one client may have half of them.
        clock: Returns seconds.
        make: Makes a region, or raises OSError.
    """

    def __init__(
        self,
        limit: int,
        lease_seconds: float = DEFAULT_LEASE_SECONDS,
        *,
        regions: int = MOST_REGIONS,
        clock: Callable[[], float] = time.monotonic,
        make: Callable[[int, RegionKind, int], Region] = make_region,
    ) -> None:
        self.lease_seconds = lease_seconds
        self._limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: dict[bytes, Session] = {}
        self._pool = Pool(limit, self._forget, make, regions=regions)
        self._regions_of_a_session = max(1, regions // 2)
        self._dropped: deque[Lease] = deque()
        self._fallbacks: Counter[str] = Counter()
        self._reply_bytes = 0

    def open(self, channel: Channel) -> Session | None:
        """Begin a session; return None if the limit of sessions is reached."""
        session = Session(secrets.token_bytes(16), channel)
        with self._lock:
            if len(self._sessions) >= _SESSIONS:
                return None
            self._sessions[session.id] = session
        return session

    def close(self, session: Session, end: End) -> None:
        """End a session: REUSE if its client has left, RETIRE if the server ends it."""
        with self._lock:
            self._close(session, end)

    def session(self, identifier: bytes) -> Session | None:
        """Return the session with this id; if there is none, return None and count a fallback."""
        with self._lock:
            session = self._sessions.get(identifier)
            if session is None:
                self._fallbacks["session"] += 1
        return session

    def lend(self, session: Session, nbytes: int) -> Loan | None:
        """Lend a region for a reply of ``nbytes``; return None if the reply must be sent."""
        session.channel.poll()
        with self._lock:
            lease = self._lend(session, RegionKind.REPLY, nbytes)
            if lease is None:
                return None
            lease.users += 1
        return Loan(lease, nbytes, self._publish, self._dropped.append)

    def borrow(self, session: Session, nbytes: int) -> Lease | None:
        """Lend a client a region for an input; return None if the client must send the input."""
        with self._lock:
            return self._lend(session, RegionKind.INPUT, nbytes)

    def give_back(self, session: Session, number: int, generation: int) -> None:
        """End a lease that its client returns; ignore leases that aren't its own or are in use."""
        with self._lock:
            lease = session.leases.get(number)
            if lease is not None and lease.generation == generation and not lease.users:
                self._settle(lease, End.REUSE)

    def read(self, session: Session | None, at: SharedSlice) -> memoryview:
        """Return a private copy of what a client wrote, as the client may change it at any time.

        Raises:
            SharedMemoryLostError: If the region is not lent to the client in this generation.
            InvalidInputError: If the bytes are not all within the region.
        """
        with self._lock:
            lease = self._readable(session, at)
            lease.users += 1
            memory = lease.region.memory
        try:
            copy = np.empty(at.size, np.uint8)
            # numpy copies without the GIL, unlike a slice assignment.
            np.copyto(
                copy, np.frombuffer(memory, np.uint8, at.size, at.offset) if at.size else copy
            )
        finally:
            with self._lock:
                self._leave(lease)
        return copy.data

    def tick(self) -> None:
        """Retire expired leases, and close regions that were unused for as long."""
        with self._lock:
            self._collect()
            before = self._clock() - self.lease_seconds
            for session in self._sessions.values():
                for lease in session.leases.values():
                    if not (lease.retired or lease.users) and lease.since < before:
                        lease.retired = True
                        self._pool.retire(lease.region)
            self._pool.reap(before)

    def state(self) -> SharedMemoryState:
        """Return the current state."""
        sizes: Counter[str] = Counter(leased=0, input=0, retired=0)
        regions: Counter[str] = Counter(leased=0, input=0, retired=0)
        with self._lock:
            self._collect()
            for session in self._sessions.values():
                for lease in session.leases.values():
                    kind = "input" if lease.region.kind is RegionKind.INPUT else "leased"
                    name = "retired" if lease.retired else kind
                    sizes[name] += lease.region.size
                    regions[name] += 1
            sizes["free"], regions["free"] = self._pool.free_bytes, self._pool.free_regions
            return SharedMemoryState(
                self._limit,
                len(self._sessions),
                sizes,
                regions,
                dict(self._fallbacks),
                self._reply_bytes,
            )

    def _lend(self, session: Session, kind: RegionKind, nbytes: int) -> Lease | None:
        self._collect()
        size = size_class(nbytes)
        reason = ""
        region = None
        if session.closed:
            reason = "session"
        elif nbytes < 1 or session.held + size > self._limit // 2:
            reason = "share"
        else:
            try:
                region = self._pool.take(kind, nbytes, session.known)
                reason = "" if region else "limit"
                if region and self._has_enough(session, region):
                    self._put_back(region)
                    region, reason = None, "share"
            except OSError:
                reason = "system"
        if region is not None:
            lease = self._announced(session, region)
            if lease is not None:
                return lease
            reason = "socket"
        if kind is RegionKind.REPLY:
            self._fallbacks[reason] += 1
        return None

    def _has_enough(self, session: Session, region: Region) -> bool:
        """Return whether a client has mapped the maximum number of regions."""
        retired = sum(lease.retired for lease in session.leases.values())
        new = region.number not in session.known
        return new and len(session.known) + retired >= self._regions_of_a_session

    def _announced(self, session: Session, region: Region) -> Lease | None:
        """Lend a region, after sending its descriptor if the client doesn't have it."""
        lease = Lease(region, session, self._clock())
        session.leases[region.number] = lease
        session.held += region.size
        if region.number not in session.known and not session.channel.announce(region):
            self._settle(lease, End.REUSE)
            self._close(session, End.RETIRE)
            return None
        session.known[region.number] = lease.generation
        return lease

    def _readable(self, session: Session | None, at: SharedSlice) -> Lease:
        lease = None if session is None else session.leases.get(at.region)
        if (
            lease is None
            or lease.retired
            or lease.ended
            or lease.region.kind is not RegionKind.INPUT
        ):
            raise SharedMemoryLostError(
                f"shared: got region {at.region}, which is not an input region of this session"
            )
        if at.generation != lease.generation:
            raise SharedMemoryLostError(
                f"shared: got generation {at.generation} of region {at.region}, expected the "
                f"one that was lent"
            )
        if at.offset > lease.region.size or at.size > lease.region.size - at.offset:
            raise InvalidInputError(
                f"shared: got {at.size} bytes from {at.offset}, expected them within the "
                f"{lease.region.size} bytes of region {at.region}"
            )
        return lease

    def _publish(self, lease: Lease, nbytes: int) -> None:
        with self._lock:
            self._reply_bytes += nbytes
            self._leave(lease)

    def _leave(self, lease: Lease) -> None:
        lease.users -= 1
        lease.since = self._clock()
        if lease.ended is not None and not lease.users:
            self._settle(lease, lease.ended)

    def _collect(self) -> None:
        """Take back loans that were dropped; no client has seen them."""
        while self._dropped:
            self._settle(self._dropped.popleft(), End.REUSE)

    def _settle(self, lease: Lease, end: End) -> None:
        session, region = lease.session, lease.region
        del session.leases[region.number]
        session.held -= region.size
        if lease.retired:
            self._pool.settle(region.size)
        elif end is End.REUSE:
            self._put_back(region)
        else:
            self._pool.drop(region)

    def _put_back(self, region: Region) -> None:
        if region.kind is RegionKind.REPLY:
            self._pool.give(region, self._clock())
        else:  # The client that had it may still write to it.
            self._pool.drop(region)

    def _close(self, session: Session, end: End) -> None:
        if session.closed:
            return
        session.closed = True
        del self._sessions[session.id]
        for lease in list(session.leases.values()):
            lease.ended = end
            if not lease.users:
                self._settle(lease, end)
        session.channel.close()

    def _forget(self, region: Region) -> None:
        for session in self._sessions.values():
            generation = session.known.pop(region.number, None)
            if generation is not None:
                session.channel.forget(region.number, generation)
