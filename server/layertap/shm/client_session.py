"""The client's end of the socket: maps the regions that it is lent, and returns them.

Note [Views keep the lease]
    All views of a reply are views of one array over the region's mapping. When the last view is
    freed, so is that array, and its finalizer returns the lease. The finalizer may run in any
    thread, while any lock is held, so it takes no lock: sets and dicts change by single operations,
    and the packet is sent without waiting.

    The socket stays open as long as there are views, even after the client is closed, because its
    end would tell the server that the regions may be reused. It also stays open while a call is in
    progress, as its reply may have arrived although nothing views it yet.

Note [Replies that nobody has read yet]
    A lease may expire while its reply waits to be read, in a stream with a slow consumer. So while
    calls are in progress, a region that the server has closed is kept unless its last lease was
    seen here. Once no call is in progress, such a reply will never be read.

Note [Forks]
    A forked child shares its parent's socket. If it returned a lease, or kept the socket open, that
    would affect the parent. So the child closes its copy.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from layertap.errors import DecodeError, SharedMemoryLostError
from layertap.shm.packets import (
    PACKET_BYTES,
    VERSION,
    Packet,
    PacketKind,
    from_id,
    to_id,
)
from layertap.shm.regions import RegionKind, map_region
from layertap.shm.shared_memory import LEAST_BYTES
from layertap.wire.dtypes import of_array
from layertap.wire.tensors import Arrays, SharedSlice, SharedTensor, TensorView

__all__ = ["Borrowed", "ClientSession", "is_shared"]

_WAIT_SECONDS = 1.0
_IDLE_INPUTS = 4
_CLOEXEC = 0x40000000  # MSG_CMSG_CLOEXEC, for which Python has no name.


class _Mapped:
    """A mapped region, and what is known about its leases.

    Attributes:
        leases: The generations of the leases that are in use here.
        seen: The largest generation seen so far.
        forgotten: The generation after which the server won't use the region again; 0 for none.
    """

    def __init__(self, number: int, kind: RegionKind, size: int, fd: int) -> None:
        self.number = number
        self.kind = kind
        self.size = size
        self.fd = fd
        self.leases: set[int] = set()
        self.seen = 0
        self.forgotten = 0
        weakref.finalize(self, os.close, fd).atexit = False
        self.memory = map_region(fd, kind, size)


class _PrivateMap(mmap.mmap):
    """A private, writable mapping of a lent region; it keeps the lease."""

    lease: np.ndarray


class _Lease:
    """One lease of a reply region, with the array that all its views are based on."""

    def __init__(self, mapped: _Mapped, released: Callable[[], None]) -> None:
        self._mapped = mapped
        self._array = np.frombuffer(mapped.memory, np.uint8)
        self._private: weakref.ref[_PrivateMap] | None = None
        weakref.finalize(self._array, released).atexit = False

    def find(self, tensor: SharedTensor) -> TensorView:
        at = tensor.at
        if at.offset > self._mapped.size or at.size > self._mapped.size - at.offset:
            raise DecodeError(
                f"tensor: shared: got {at.size} bytes from {at.offset}, expected them within the "
                f"{self._mapped.size} bytes of region {at.region}"
            )
        part = slice(at.offset, at.offset + at.size)
        return tensor.view(self._array.data[part], lambda: memoryview(self._remapped())[part])

    def _remapped(self) -> _PrivateMap:
        private = self._private() if self._private else None
        if private is None:
            size = self._mapped.size
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            private = _PrivateMap(self._mapped.fd, size, mmap.MAP_PRIVATE, protection)
            private.lease = self._array
            self._private = weakref.ref(private)
        return private


class Borrowed:
    """An input region that is lent to this client, for one request at a time.

    Attributes:
        number: The region's number.
        generation: The generation of the lease.
    """

    def __init__(self, mapped: _Mapped, generation: int) -> None:
        self.mapped = mapped
        self.number = mapped.number
        self.generation = generation

    def write(self, array: np.ndarray[Any, np.dtype[Any]]) -> None:
        """Write an array in C order at the beginning of the region."""
        flat = np.frombuffer(self.mapped.memory, array.dtype, array.size)
        np.copyto(flat.reshape(array.shape), array)


class ClientSession:
    """A session with a server on this machine. Safe to share between threads.

    Args:
        name: The abstract socket's name, without the zero byte in front.
        ticket: The ticket that OpenSharedMemory returned.

    Attributes:
        session: The session's id, for requests.
        lost: Whether the server has left or has ended the session.

    Raises:
        OSError: If nothing listens there, or the server refuses the session.
        ValueError: If the server doesn't answer with a WELCOME of our version.
    """

    def __init__(self, name: str, ticket: bytes) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._changed = threading.Condition()
        self._regions: dict[int, _Mapped] = {}
        self._unsent: deque[Packet] = deque()
        self._live: set[tuple[int, int]] = set()
        self._borrowing = threading.Lock()
        self._lent: Packet | None = None
        self._idle: list[Borrowed] = []
        self._calls = 0
        self._closing = False
        self.lost = False
        try:
            self.session = self._begin(name, ticket)
        except BaseException:
            self._socket.close()
            raise
        # Registered first, so that it runs after the finalizers that may send.
        weakref.finalize(self, self._socket.close).atexit = False
        _OPEN.add(self)
        threading.Thread(target=self._run, name="layertap-shared-client", daemon=True).start()

    def begin_call(self) -> None:
        """Record that a call has begun, whose replies may arrive from now on."""
        with self._changed:
            self._calls += 1

    def end_call(self) -> None:
        """Record that a call has ended: its replies were read, or never will be."""
        # Note [Replies that nobody has read yet]
        with self._changed:
            self._calls -= 1
            if not self._calls:
                for mapped in list(self._regions.values()):
                    if mapped.forgotten and not mapped.leases:
                        self._let_go(mapped, mapped.forgotten)
        self._end_if_unused()

    def finder(self) -> Callable[[SharedTensor], TensorView]:
        """Return a function that finds the tensors of one reply.

        It raises SharedMemoryLostError for a region that was not lent, and DecodeError for bytes
        outside a region.
        """
        leases: dict[tuple[int, int], _Lease] = {}

        def find(tensor: SharedTensor) -> TensorView:
            key = tensor.at.region, tensor.at.generation
            if key not in leases:
                leases[key] = self._lease(*key)
            return leases[key].find(tensor)

        return find

    def borrow(self, nbytes: int) -> Borrowed | None:
        """Return an input region for ``nbytes``; None if the server lends no region."""
        with self._changed:
            kept = [each for each in self._idle if each.mapped.size >= nbytes]
            if kept:
                best = min(kept, key=lambda each: each.mapped.size)
                self._idle.remove(best)
                best.mapped.leases.add(best.generation)
                return best
            while len(self._idle) >= _IDLE_INPUTS:
                self._let_go(self._idle[0].mapped, self._idle.pop(0).generation)
        with self._borrowing:
            return self._ask(nbytes)

    def keep(self, borrowed: Borrowed) -> None:
        """Keep an input region for the next request, once the reply has arrived."""
        with self._changed:
            borrowed.mapped.leases.discard(borrowed.generation)
            if borrowed.mapped.forgotten:
                self._let_go(borrowed.mapped, borrowed.generation)
            elif not self.lost:
                self._idle.append(borrowed)

    @contextmanager
    def written(self, inputs: Arrays) -> Iterator[list[SharedSlice | None]]:
        """Write the large inputs of a request into shared memory for the duration of the block.

        Yields:
            The place of each input; None for an input that must be sent.

        Raises:
            InvalidInputError: If an array's dtype has no row in the dtype table.
        """
        with ExitStack() as stack:
            yield [stack.enter_context(self._written(array)) for _, array in inputs]

    def close(self) -> None:
        """End the session once no lent region is viewed and no call is in progress."""
        self._closing = True
        self._end_if_unused()

    @contextmanager
    def _written(self, array: np.ndarray) -> Iterator[SharedSlice | None]:
        if array.nbytes < LEAST_BYTES:
            yield None
            return
        of_array(array)  # Raises for a dtype that can't be written, such as object.
        borrowed = self.borrow(array.nbytes)
        if borrowed is None:
            yield None
            return
        try:
            borrowed.write(array)
            yield SharedSlice(borrowed.number, borrowed.generation, 0, array.nbytes)
        finally:
            self.keep(borrowed)

    def _begin(self, name: str, ticket: bytes) -> bytes:
        self._socket.settimeout(_WAIT_SECONDS)
        self._socket.connect(f"\0{name}")
        self._socket.send(Packet(PacketKind.HELLO, *from_id(ticket), VERSION).pack())
        welcome = Packet.unpack(self._socket.recv(PACKET_BYTES + 1))
        if welcome.kind is not PacketKind.WELCOME or welcome.flag != VERSION:
            raise ValueError(f"got {welcome.kind.name} {welcome.flag}, expected WELCOME {VERSION}")
        self._socket.settimeout(None)
        return to_id(welcome)

    def _lease(self, number: int, generation: int) -> _Lease:
        with self._changed:
            # The region was announced before the reply, but another thread reads that packet.
            self._changed.wait_for(lambda: number in self._regions or self.lost, _WAIT_SECONDS)
            mapped = self._regions.get(number)
            if mapped is None or mapped.kind is not RegionKind.REPLY:
                raise SharedMemoryLostError(f"shared: got region {number}, which was not lent")
            mapped.leases.add(generation)
            mapped.seen = max(mapped.seen, generation)
            self._live.add((number, generation))
        return _Lease(mapped, lambda: self._released(mapped, generation))

    def _released(self, mapped: _Mapped, generation: int) -> None:
        # Note [Views keep the lease]
        mapped.leases.discard(generation)
        if mapped.forgotten:
            self._regions.pop(mapped.number, None)
        self._live.discard((mapped.number, generation))
        self._send(Packet(PacketKind.RETURN, mapped.number, generation))
        self._end_if_unused()

    def _end_if_unused(self) -> None:
        if self._closing and not (self._calls or self._live or self.lost):
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _send(self, packet: Packet) -> None:
        self._unsent.append(packet)
        while self._unsent and not self.lost:
            try:
                first = self._unsent.popleft()
            except IndexError:  # Another thread has taken it.
                return
            try:
                self._socket.send(first.pack(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:  # It will be sent with the next packet.
                self._unsent.appendleft(first)
                return
            except OSError:
                return

    def _ask(self, nbytes: int) -> Borrowed | None:
        self._lent = None
        self._send(Packet(PacketKind.BORROW, nbytes, 0))
        with self._changed:
            self._changed.wait_for(lambda: self._lent or self.lost, _WAIT_SECONDS)
            lent = self._lent
            mapped = self._regions.get(lent.first) if lent else None
            # A late answer to one request may be read by the next request.
            if lent is None or mapped is None or mapped.size < nbytes:
                return None
            mapped.leases.add(lent.second)
        return Borrowed(mapped, lent.second)

    def _let_go(self, mapped: _Mapped, generation: int) -> None:
        self._regions.pop(mapped.number, None)
        self._send(Packet(PacketKind.RETURN, mapped.number, generation))

    def _run(self) -> None:
        try:
            while True:
                data, fds, _, _ = socket.recv_fds(self._socket, PACKET_BYTES + 1, 1, _CLOEXEC)
                if not data:
                    return
                self._take(Packet.unpack(data), fds)
        except (OSError, ValueError, SharedMemoryLostError):
            return
        finally:
            with self._changed:
                self.lost = True
                self._regions.clear()
                self._idle.clear()
                self._changed.notify_all()
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _take(self, packet: Packet, fds: list[int]) -> None:
        if packet.kind is PacketKind.REGION and fds:
            mapped = _Mapped(packet.first, RegionKind(packet.flag), packet.second, fds[0])
            with self._changed:
                self._regions[mapped.number] = mapped
                self._changed.notify_all()
        elif packet.kind is PacketKind.LENT:
            with self._changed:
                self._lent = packet
                self._changed.notify_all()
        elif packet.kind is PacketKind.FORGET:
            self._forget(packet)
        else:
            for fd in fds:
                os.close(fd)
            raise ValueError(f"got {packet.kind.name}")

    def _forget(self, packet: Packet) -> None:
        with self._changed:
            mapped = self._regions.get(packet.first)
            if mapped is None:
                return
            # In this order, so that a thread that returns the last lease meanwhile sees it.
            mapped.forgotten = packet.second
            unread = mapped.kind is RegionKind.REPLY and self._calls and packet.second > mapped.seen
            if not mapped.leases and not unread:
                self._idle = [each for each in self._idle if each.mapped is not mapped]
                self._let_go(mapped, packet.second)


def is_shared(inputs: Arrays) -> bool:
    """Return whether one of a request's inputs is large enough for shared memory."""
    return any(array.nbytes >= LEAST_BYTES for _, array in inputs)


_OPEN: weakref.WeakSet[ClientSession] = weakref.WeakSet()


def _forked() -> None:
    for connection in list(_OPEN):
        connection.lost = True
        connection._socket.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
