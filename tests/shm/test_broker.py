"""The broker's socket: who may connect, and what happens if a client misbehaves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layertap.errors import OverloadedError
from layertap.shm.broker import Broker, same_user
from layertap.shm.packets import PACKET_BYTES, VERSION, Packet, PacketKind, from_id, to_id
from layertap.shm.regions import RegionKind, map_region, supported
from layertap.shm.shared_memory import SharedMemory

pytestmark = pytest.mark.skipif(not supported(), reason="shared memory is Linux's")

MIB = 1 << 20
NOBODY = 65534


@pytest.fixture
def broker() -> Iterator[Broker]:
    """A broker of 16 MiB with leases of a minute."""
    broker = Broker(SharedMemory(16 * MIB))
    broker.start()
    yield broker
    broker.close()


class Client:
    """A client that sends what a test says, right or wrong."""

    def __init__(self, broker: Broker) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(10)
        try:
            self.socket.connect(f"\0{broker.name}")
        except OSError:
            self.close()
            raise

    def say(self, kind: PacketKind, first: int = 0, second: int = 0, flag: int = 0) -> None:
        self.socket.send(Packet(kind, first, second, flag).pack())

    def hear(self) -> tuple[Packet, list[int]]:
        data, fds, _, _ = socket.recv_fds(self.socket, PACKET_BYTES, 1)
        return Packet.unpack(data), fds

    def enter(self, ticket: bytes) -> bytes:
        """Present a ticket and return the session."""
        self.say(PacketKind.HELLO, *from_id(ticket), VERSION)
        packet, _ = self.hear()
        assert (packet.kind, packet.flag) == (PacketKind.WELCOME, VERSION)
        return to_id(packet)

    def ended(self) -> bool:
        """Return whether the server has ended the connection; earlier packets are skipped."""
        try:
            while self.socket.recv(PACKET_BYTES):
                pass
        except ConnectionResetError:
            pass
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def client(broker: Broker) -> Iterator[Client]:
    """A client that has connected and sent nothing."""
    client = Client(broker)
    yield client
    client.close()


def eventually(condition: Callable[[], bool]) -> bool:
    """Wait until the broker's thread has handled something."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_regions_come_with_their_descriptor(broker: Broker, client: Client) -> None:
    """A lent region is announced with a descriptor, once, and is returned by a packet."""
    session = broker.memory.session(client.enter(broker.ticket()))
    loan = broker.memory.lend(session, MIB)
    loan.buffer[:4] = b"abcd"
    packet, [fd] = client.hear()
    assert packet == Packet(PacketKind.REGION, loan.region, MIB, RegionKind.REPLY)
    assert map_region(fd, RegionKind.REPLY, MIB)[:4] == b"abcd"
    os.close(fd)
    loan.publish()
    client.say(PacketKind.RETURN, loan.region, loan.generation)
    assert eventually(lambda: broker.memory.state().regions["free"] == 1)


def test_input_region_is_lent_on_request(broker: Broker, client: Client) -> None:
    """BORROW is answered with the region, then its lease; if it is too large, with no region."""
    client.enter(broker.ticket())
    client.say(PacketKind.BORROW, 100_000)
    packet, [fd] = client.hear()
    assert (packet.kind, packet.flag, packet.second >= 100_000) == (PacketKind.REGION, 2, True)
    os.close(fd)
    assert client.hear()[0] == Packet(PacketKind.LENT, packet.first, 1)
    for size in (0, 9 * MIB, (1 << 64) - 1):
        client.say(PacketKind.BORROW, size)
        assert client.hear()[0] == Packet(PacketKind.LENT, 0, 0)
    assert broker.memory.state().regions["input"] == 1


def test_ticket_lets_in_once(broker: Broker, client: Client) -> None:
    """A used ticket, an invented one and a missing one are refused."""
    ticket = broker.ticket()
    client.enter(ticket)
    for wrong in (ticket, os.urandom(16), bytes(16)):
        other = Client(broker)
        other.say(PacketKind.HELLO, *from_id(wrong), VERSION)
        assert other.ended()
        other.close()
    assert broker.memory.state().sessions == 1


def test_tickets_are_bounded(broker: Broker) -> None:
    """More unused tickets than allowed are an error of the call that requests one."""
    tickets = {broker.ticket() for _ in range(64)}
    assert len(tickets) == 64
    with pytest.raises(OverloadedError):
        broker.ticket()


GARBAGE: dict[str, tuple[bytes, bool]] = {
    "noise": (bytes(range(200, 224)), True),
    "a packet cut short": (bytes(Packet(PacketKind.RETURN, 1, 1).pack()[:-1]), True),
    "a packet too long": (Packet(PacketKind.RETURN, 1, 1).pack() + b"x", True),
    "a huge packet": (b"\4" * 100_000, True),
    "what only servers say": (Packet(PacketKind.REGION, 1, 1).pack(), True),
    "hello again": (Packet(PacketKind.HELLO, 1, 1, VERSION).pack(), True),
    "no hello": (Packet(PacketKind.BORROW, 1, 1).pack(), False),
    "another version": (Packet(PacketKind.HELLO, 1, 1, VERSION + 1).pack(), False),
    "noise for hello": (b"GET / HTTP/1.1\r\n", False),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_ends_its_connection_and_no_other(
    broker: Broker, client: Client, case: str
) -> None:
    """Malformed or wrong packets end the connection; other connections continue."""
    good = Client(broker)
    session = broker.memory.session(good.enter(broker.ticket()))
    data, entered = GARBAGE[case]
    if entered:
        client.enter(broker.ticket())
    client.socket.send(data)
    assert client.ended()
    assert eventually(lambda: broker.memory.state().sessions == 1)
    assert broker.memory.lend(session, MIB) is not None
    assert good.hear()[0].kind is PacketKind.REGION
    good.close()


def test_descriptors_that_a_client_sends_are_dropped(broker: Broker, client: Client) -> None:
    """Files that clients send with packets don't accumulate in the server."""
    client.enter(broker.ticket())
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with Path("/dev/null").open("rb") as file:
        for _ in range(50):
            packet = Packet(PacketKind.RETURN, 1, 1).pack()
            socket.send_fds(client.socket, [packet], [file.fileno()] * 4)
    client.say(PacketKind.BORROW, 0)
    assert client.hear()[0].kind is PacketKind.LENT
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


def test_client_that_never_reads_is_sent_away(broker: Broker, client: Client) -> None:
    """A full socket ends the session, blocks nobody, and its regions are not reused."""
    session = broker.memory.session(client.enter(broker.ticket()))
    loan = broker.memory.lend(session, MIB)
    loan.publish()
    begun = time.monotonic()
    for _ in range(100_000):
        session.channel.forget(1, 1)
        if broker.memory.session(session.id) is None:
            break
    assert time.monotonic() - begun < 30
    assert eventually(lambda: broker.memory.state().sessions == 0)
    assert broker.memory.state().regions["free"] == 0


def test_gone_client_leaves_its_regions(broker: Broker, client: Client) -> None:
    """When the socket ends, the leases are freed without any packet."""
    session = broker.memory.session(client.enter(broker.ticket()))
    for _ in range(5):
        broker.memory.lend(session, MIB).publish()
    client.close()
    assert eventually(lambda: broker.memory.state().regions["free"] == 5)


def test_what_was_given_back_is_lent_at_once(broker: Broker, client: Client) -> None:
    """A region that was returned just before the next reply is the one that it is written to.

    But for the moment in which the broker's thread has read the packet and not yet obeyed it.
    """
    regions = set()
    session = broker.memory.session(client.enter(broker.ticket()))
    for _ in range(300):
        loan = broker.memory.lend(session, MIB)
        if loan.region not in regions:
            regions.add(loan.region)
            os.close(client.hear()[1][0])
        loan.publish()
        client.say(PacketKind.RETURN, loan.region, loan.generation)
    assert eventually(lambda: broker.memory.state().regions["leased"] == 0)
    assert len(regions) <= 2


def test_garbage_is_garbage_for_whoever_reads_it(broker: Broker, client: Client) -> None:
    """A malformed packet ends the connection even if a request's thread reads it."""
    session = broker.memory.session(client.enter(broker.ticket()))
    client.socket.send(b"noise")
    session.channel.poll()
    assert client.ended()
    assert eventually(lambda: broker.memory.state().sessions == 0)
    assert broker.memory.lend(session, MIB) is None


def test_many_leases_leak_nothing(broker: Broker, client: Client) -> None:
    """10,000 leases and returns over the socket leave as many files and bytes as one."""
    session = broker.memory.session(client.enter(broker.ticket()))
    fds = []

    def cycle() -> None:
        loan = broker.memory.lend(session, 100_000)
        if loan.region not in seen:
            packet, [fd] = client.hear()
            seen.add(packet.first)
            fds.append(fd)
        loan.publish()
        client.say(PacketKind.RETURN, loan.region, loan.generation)

    seen: set[int] = set()
    cycle()
    assert eventually(lambda: broker.memory.state().regions["free"] == 1)
    files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(10_000):
        cycle()
        while session.held > MIB:
            time.sleep(0.0001)  # The broker's thread reads the returns.
    assert eventually(lambda: broker.memory.state().bytes["leased"] == 0)
    made = len(seen)
    assert made < 12
    assert broker.memory.state().regions["free"] == made
    # For each region its file and ours; Python's mmap keeps a duplicate.
    assert len(os.listdir("/proc/self/fd")) <= files + 3 * (made - 1)  # noqa: PTH208
    for fd in fds:
        os.close(fd)


def test_silent_connections_are_closed(
    broker: Broker, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that sends nothing is closed after a while."""
    monkeypatch.setattr("layertap.shm.broker._TICKET_SECONDS", 0.1)
    assert client.ended()


def test_closed_broker_ends_all_sessions(broker: Broker, client: Client) -> None:
    """Every client sees the end of its session, and the socket's name is free."""
    client.enter(broker.ticket())
    broker.close()
    assert client.ended()
    with pytest.raises(ConnectionRefusedError):
        Client(broker)


def test_broker_can_be_closed_while_its_thread_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread may see that it is over before it is woken up."""
    broker = Broker(SharedMemory(16 * MIB, 0.1))
    broker.start()
    thread = broker._thread
    real = broker._waker

    class Late:
        """The waker of a caller that comes to it only after the thread has ended."""

        fileno, close = real.fileno, real.close

        def send(self, data: bytes) -> None:
            thread.join(10)
            assert not thread.is_alive()
            real.send(data)

    monkeypatch.setattr(broker, "_waker", Late())
    broker.close()
    broker.close()
    assert real.fileno() == -1


def test_broker_that_never_started_can_be_closed() -> None:
    """A server that failed before it served leaves no socket behind."""
    broker = Broker(SharedMemory(MIB))
    broker.close()
    with pytest.raises(ConnectionRefusedError):
        Client(broker)


KNOCK = textwrap.dedent("""
    import os, socket, sys
    os.setgid(65534); os.setuid(65534)
    knocking = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    knocking.settimeout(10)
    knocking.connect("\\0" + sys.argv[1])
    try:
        knocking.send(bytes.fromhex(sys.argv[2]))
        print("answer" if knocking.recv(24) else "end")
    except (BrokenPipeError, ConnectionResetError):
        print("end")
""")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_other_users_are_sent_away(broker: Broker) -> None:
    """A process of another user is refused by its kernel credentials, even with a valid ticket."""
    hello = Packet(PacketKind.HELLO, *from_id(broker.ticket()), VERSION).pack().hex()
    knock = subprocess.run(
        [sys.executable, "-c", KNOCK, broker.name, hello],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert knock.stdout == "end\n"
    assert broker.memory.state().sessions == 0


def test_user_is_what_the_kernel_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's user is compared with the effective user of this process."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    assert same_user(here)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert not same_user(here)
    here.close()
    there.close()


def test_clients_come_and_go_at_once(broker: Broker) -> None:
    """Forty clients, half of which misbehave, leave nothing behind."""
    wrong: list[object] = []

    def visit(rude: bool) -> None:
        client = Client(broker)
        try:
            session = broker.memory.session(client.enter(broker.ticket()))
            loan = broker.memory.lend(session, 100_000)
            os.close(client.hear()[1][0])
            loan.publish()
            if not rude:
                client.say(PacketKind.RETURN, loan.region, loan.generation)
        except Exception as error:  # noqa: BLE001 - it is what the test is about
            wrong.append(error)
        finally:
            client.close()

    threads = [threading.Thread(target=visit, args=(n % 2 == 0,)) for n in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert eventually(lambda: broker.memory.state().sessions == 0)
    assert eventually(lambda: broker.memory.state().regions["leased"] == 0)
