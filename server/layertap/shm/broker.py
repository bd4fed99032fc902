"""The server's end of the sockets that give clients their sessions and their regions.

Note [Who may connect]
    The socket is an abstract one with a random name: it leaves no file and exists only in the
    server's network namespace, so every peer is on the same machine. The kernel reports the peer's
    user, and any user but the server's own is refused. The first packet presents a ticket, which
    OpenSharedMemory gives to authorized callers; it is valid once and for a few seconds.

Note [One thread]
    One thread reads all sockets. It never waits for a client: a client that can't take a packet at
    once loses its session. Other threads send, under the lock of SharedMemory. Before such a thread
    lends a region, it reads the packets that the client sent before its request, because these
    usually return the very region that suits best.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable

from layertap.errors import OverloadedError
from layertap.shm.leases import End, Session
from layertap.shm.packets import (
    PACKET_BYTES,
    VERSION,
    Packet,
    PacketKind,
    from_id,
    to_id,
)
from layertap.shm.regions import Region, supported
from layertap.shm.shared_memory import SharedMemory

__all__ = ["Broker", "open_broker", "same_user"]

_log = logging.getLogger(__name__)

_TICKETS = 64
_TICKET_SECONDS = 10.0
_CLIENTS = 128
_SEND_BYTES = 1 << 20
_POLLED = 16
_CREDENTIALS = struct.Struct("3i")


class Broker:
    """Listens from ``start`` until it is closed.

    Args:
        memory: The shared memory to lend.
        clients: Maximum number of clients that are connected.

    Attributes:
        memory: The shared memory to lend.
        name: The abstract socket's name, without the zero byte in front.
    """

    def __init__(self, memory: SharedMemory, clients: int = _CLIENTS) -> None:
        self.name = f"layertap-{secrets.token_hex(16)}"
        self.memory = memory
        self._most = clients
        self._tickets: dict[bytes, float] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._selector = selectors.DefaultSelector()
        self._connections: set[_Connection] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"\0{self.name}")
        self._listener.listen(_TICKETS)
        self._listener.setblocking(False)
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="layertap-shared", daemon=True)

    def start(self) -> None:
        """Accept clients from now on."""
        self._thread.start()

    def ticket(self) -> bytes:
        """Return a ticket for one session; raise OverloadedError if too many are unused."""
        now = time.monotonic()
        with self._lock:
            self._tickets = {key: end for key, end in self._tickets.items() if end > now}
            if len(self._tickets) >= _TICKETS:
                raise OverloadedError(
                    f"{_TICKETS} clients have unused tickets for shared memory, the most allowed"
                )
            ticket = secrets.token_bytes(16)
            self._tickets[ticket] = now + _TICKET_SECONDS
        return ticket

    def close(self) -> None:
        """End all sessions; clients may continue to read regions that were lent to them."""
        self._closed = True
        if self._waker.fileno() < 0:  # It was closed before.
            return
        if self._thread.ident is None:  # It never started.
            self._end_all()
        else:
            # The thread may have seen by itself that it is over, so it must not close this socket.
            self._waker.send(b"\0")
            self._thread.join()
        for each in (self._waker, self._woken):
            each.close()

    def _run(self) -> None:
        tick = min(1.0, self.memory.lease_seconds / 4)
        due = time.monotonic() + tick
        try:
            while not self._closed:
                for key, _ in self._selector.select(tick):
                    self._handle(key)
                if time.monotonic() >= due:
                    self._tick()
                    due = time.monotonic() + tick
        finally:
            # Also after an unexpected error in this thread: clients then use the network.
            self._closed = True
            self._end_all()

    def _end_all(self) -> None:
        for connection in list(self._connections):
            self._end(connection, End.RETIRE)
        self._selector.close()
        self._listener.close()

    def _tick(self) -> None:
        self.memory.tick()
        now = time.monotonic()
        for connection in list(self._connections):
            if connection.session is None and connection.since < now - _TICKET_SECONDS:
                self._end(connection, End.RETIRE)

    def _handle(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is self._listener:
            self._accept()
        elif isinstance(key.data, _Connection):
            self._read(key.data)

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError:
            # The peer has already left, or we are out of file descriptors: back off.
            time.sleep(0.01)
            return
        if not same_user(peer) or len(self._connections) >= self._most:
            peer.close()
            return
        connection = _Connection(peer, self._take)
        self._connections.add(connection)
        self._selector.register(peer, selectors.EVENT_READ, connection)

    def _read(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(PACKET_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end(connection, End.RETIRE if connection.refused else End.REUSE)
            return
        if not self._take(connection, data):
            self._end(connection, End.RETIRE)

    def _take(self, connection: _Connection, data: bytes) -> bool:
        """Handle a packet; return False if it is not allowed."""
        try:
            packet = Packet.unpack(data)
            if connection.session is None:
                self._welcome(connection, packet)
            else:
                self._obey(connection, connection.session, packet)
        except ValueError as error:
            _log.debug("shared memory: refused a client: %s", error)
            return False
        return True

    def _welcome(self, connection: _Connection, packet: Packet) -> None:
        if packet.kind is not PacketKind.HELLO or packet.flag != VERSION:
            raise ValueError(f"got {packet.kind.name} {packet.flag}, expected HELLO {VERSION}")
        with self._lock:
            end = self._tickets.pop(to_id(packet), 0.0)
        if end <= time.monotonic():
            raise ValueError("got no valid ticket")
        session = self.memory.open(connection)
        if session is None:
            raise ValueError("too many clients share memory")
        connection.session = session
        connection.send(Packet(PacketKind.WELCOME, *from_id(session.id), VERSION))

    def _obey(self, connection: _Connection, session: Session, packet: Packet) -> None:
        if packet.kind is PacketKind.RETURN:
            self.memory.give_back(session, packet.first, packet.second)
        elif packet.kind is PacketKind.BORROW:
            lease = self.memory.borrow(session, packet.first)
            lent = (lease.region.number, lease.generation) if lease else (0, 0)
            connection.send(Packet(PacketKind.LENT, *lent))
        else:
            raise ValueError(f"got {packet.kind.name}, expected RETURN or BORROW")

    def _end(self, connection: _Connection, end: End) -> None:
        if connection.session is not None:
            self.memory.close(connection.session, end)
        self._selector.unregister(connection.socket)
        self._connections.discard(connection)
        connection.socket.close()


class _Connection:
    """The server's end of one client's socket (a ``layertap.shm.leases.Channel``)."""

    def __init__(self, peer: socket.socket, take: Callable[[_Connection, bytes], bool]) -> None:
        peer.setblocking(False)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        self.socket = peer
        self._take = take
        self.session: Session | None = None
        self.since = time.monotonic()
        self.refused = False

    def poll(self) -> None:
        # The reading thread will notice if the connection has ended.
        for _ in range(_POLLED):
            try:
                data = self.socket.recv(PACKET_BYTES + 1)
            except OSError:
                return
            if not data:
                return
            if not self._take(self, data):
                self.close()

    def announce(self, region: Region) -> bool:
        packet = Packet(PacketKind.REGION, region.number, region.size, region.kind)
        try:
            socket.send_fds(self.socket, [packet.pack()], [region.fileno()])
        except OSError:  # The socket's buffer is full, or the client has left.
            return False
        return True

    def forget(self, number: int, generation: int) -> None:
        self.send(Packet(PacketKind.FORGET, number, generation))

    def send(self, packet: Packet) -> None:
        try:
            self.socket.send(packet.pack())
        except BlockingIOError:
            self.close()
        except OSError:  # The client has left; the reading thread will notice.
            pass

    def close(self) -> None:
        # The reading thread notices the end and closes the socket. If it finds that the client had
        # already left by itself, the client's regions may be reused.
        self.refused = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


def open_broker(
    limit_bytes: int, lease_seconds: float, *, regions: int, clients: int
) -> Broker | None:
    """Return a broker; None if the limit is 0 or the system has no such shared memory.

    Args:
        limit_bytes: Maximum bytes of all regions together.
        lease_seconds: How long a client may keep a region.
        regions: Maximum number of regions.
        clients: Maximum number of clients that are connected.
    """
    if not limit_bytes or not supported():
        return None
    try:
        return Broker(SharedMemory(limit_bytes, lease_seconds, regions=regions), clients)
    except OSError as error:  # Sockets or anonymous files are forbidden, as in some sandboxes.
        _log.warning("shared memory is not available: %s", error)
        return None


def same_user(peer: socket.socket) -> bool:
    """Return whether the other end of a Unix socket runs as this process's user (SO_PEERCRED)."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    return bool(uid == os.geteuid())
