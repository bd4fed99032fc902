"""Leases: arrays never change, nobody reads other clients' data, nothing is lost."""

from __future__ import annotations

import gc
import threading

import pytest

from layertap.errors import InvalidInputError, SharedMemoryLostError
from layertap.shm.leases import End, Loan, Session
from layertap.shm.regions import Region, RegionKind, map_region, supported
from layertap.shm.shared_memory import SessionMemory, SharedMemory
from layertap.wire.tensors import SharedSlice

pytestmark = pytest.mark.skipif(not supported(), reason="shared memory is Linux's")

MIB = 1 << 20
MOST = (1 << 64) - 1


class Channel:
    """A client's socket that records what it receives."""

    def __init__(self) -> None:
        self.regions: dict[int, Region] = {}
        self.forgotten: list[tuple[int, int]] = []
        self.closed = False
        self.full = False

    def poll(self) -> None:
        pass

    def announce(self, region: Region) -> bool:
        self.regions[region.number] = region
        return not self.full

    def forget(self, number: int, generation: int) -> None:
        self.forgotten.append((number, generation))

    def close(self) -> None:
        self.closed = True


class Clock:
    """A clock that advances only when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def memory(clock: Clock) -> SharedMemory:
    """16 MiB, with leases of 10 seconds."""
    return SharedMemory(16 * MIB, 10.0, clock=clock)


@pytest.fixture
def session(memory: SharedMemory) -> Session:
    return opened(memory)


def opened(memory: SharedMemory) -> Session:
    session = memory.open(Channel())
    assert session is not None
    return session


def lent(memory: SharedMemory, session: Session, nbytes: int = MIB) -> Loan:
    """Lend a region whose reply was sent."""
    loan = memory.lend(session, nbytes)
    assert loan is not None
    loan.publish()
    return loan


def regions(memory: SharedMemory) -> dict[str, int]:
    return {state: count for state, count in memory.state().regions.items() if count}


def test_lease_returns_and_is_lent_again(memory: SharedMemory, session: Session) -> None:
    """A returned region is lent again with a new generation, without its descriptor."""
    first = lent(memory, session)
    assert regions(memory) == {"leased": 1}
    memory.give_back(session, first.region, first.generation)
    assert regions(memory) == {"free": 1}
    session.channel.regions.clear()
    second = lent(memory, session)
    assert second.region == first.region
    assert second.generation == first.generation + 1
    assert session.channel.regions == {}
    assert memory.state().reply_bytes == 2 * MIB


def test_lent_region_is_nobody_elses(memory: SharedMemory, session: Session) -> None:
    """While a region is lent, other replies get other regions."""
    other = opened(memory)
    loans = [lent(memory, each) for each in (session, session, other)]
    assert len({loan.region for loan in loans}) == 3


@pytest.mark.parametrize("wrong", ["generation before", "generation after", "region", "session"])
def test_only_the_holder_gives_back_and_only_this_lease(
    memory: SharedMemory, session: Session, wrong: str
) -> None:
    """A stale or future generation, an unknown region or another client's return has no effect."""
    loan = lent(memory, session)
    memory.give_back(session, loan.region, loan.generation)
    loan = lent(memory, session)
    who = opened(memory) if wrong == "session" else session
    change = {"generation before": -1, "generation after": 1}.get(wrong, 0)
    number = loan.region + (wrong == "region")
    memory.give_back(who, number, loan.generation + change)
    assert regions(memory) == {"leased": 1}


def test_giving_back_twice_is_giving_back_once(memory: SharedMemory, session: Session) -> None:
    """The second return finds no lease, even if the region was lent again meanwhile."""
    loan = lent(memory, session)
    for _ in range(2):
        memory.give_back(session, loan.region, loan.generation)
    assert regions(memory) == {"free": 1}
    again = lent(memory, session)
    memory.give_back(session, loan.region, loan.generation)
    assert again.region == loan.region
    assert regions(memory) == {"leased": 1}
    assert memory.state().bytes["leased"] == session.held == MIB


def test_region_that_is_written_to_can_not_be_given_back(
    memory: SharedMemory, session: Session
) -> None:
    """A client that guesses the lease of an unfinished reply can't free its region."""
    loan = memory.lend(session, MIB)
    memory.give_back(session, loan.region, loan.generation)
    assert lent(memory, session).region != loan.region
    loan.buffer[:1] = b"x"
    loan.publish()
    memory.give_back(session, loan.region, loan.generation)
    assert regions(memory) == {"leased": 1, "free": 1}


def test_loan_that_is_dropped_goes_back(memory: SharedMemory, session: Session) -> None:
    """If a request fails after it got a region, the region is free again."""
    loan = memory.lend(session, MIB)
    assert regions(memory) == {"leased": 1}
    del loan
    gc.collect()
    assert regions(memory) == {"free": 1}
    assert session.held == 0


def test_gone_client_frees_everything_at_once(memory: SharedMemory, session: Session) -> None:
    """When a client's socket ends, its 8 leases return to the pool, and its input is closed."""
    for _ in range(7):
        lent(memory, session)
    assert memory.borrow(session, MIB // 2) is not None
    memory.close(session, End.REUSE)
    assert regions(memory) == {"free": 7}
    assert memory.session(session.id) is None


def test_gone_client_frees_nothing_that_is_written_to(
    memory: SharedMemory, session: Session
) -> None:
    """A reply that is being written when its client leaves is reused only after the write."""
    loan = memory.lend(session, MIB)
    memory.close(session, End.REUSE)
    assert "free" not in regions(memory)
    loan.publish()
    assert regions(memory) == {"free": 1}


@pytest.mark.parametrize("published", [True, False])
def test_client_that_was_sent_away_keeps_what_it_had(
    memory: SharedMemory, session: Session, published: bool
) -> None:
    """If the server ends a session, its regions are never reused, as the client may read them."""
    loan = memory.lend(session, MIB)
    if published:
        loan.publish()
    memory.close(session, End.RETIRE)
    if not published:
        loan.publish()
    assert session.channel.closed
    assert regions(memory) == {}
    assert memory.state().sessions == 0
    assert lent(memory, opened(memory)).region != loan.region


def test_lease_that_runs_out_is_retired(
    memory: SharedMemory, session: Session, clock: Clock
) -> None:
    """Its region is not reused, so the client's arrays stay; the client is notified."""
    loan = memory.lend(session, MIB)
    loan.buffer[:4] = b"mine"
    loan.publish()
    channel = session.channel
    seen = map_region(channel.regions[loan.region].fileno(), RegionKind.REPLY, MIB)
    clock.now = 10.0
    memory.tick()
    assert regions(memory) == {"leased": 1}
    clock.now = 10.1
    memory.tick()
    assert channel.forgotten == [(loan.region, loan.generation)]
    assert regions(memory) == {"retired": 1}
    for _ in range(3):
        other = memory.lend(session, MIB)
        assert other.region != loan.region
        other.buffer[:4] = b"else"
    assert seen[:4] == b"mine"
    memory.give_back(session, loan.region, loan.generation)
    gc.collect()
    assert "retired" not in regions(memory)


def test_retired_bytes_count_against_client_and_limit(
    memory: SharedMemory, session: Session, clock: Clock
) -> None:
    """A client that keeps memory gets no more by waiting; once it is gone all is free."""
    for _ in range(8):
        lent(memory, session)
    clock.now = 11.0
    memory.tick()
    assert memory.lend(session, MIB) is None
    assert memory.state().bytes["retired"] == 8 * MIB
    memory.close(session, End.REUSE)
    assert [lent(memory, opened(memory), 8 * MIB) for _ in range(2)]


def test_lease_does_not_run_out_while_it_is_written(
    memory: SharedMemory, session: Session, clock: Clock
) -> None:
    """A lease begins when its reply is sent, however long the model runs."""
    loan = memory.lend(session, MIB)
    clock.now = 100.0
    memory.tick()
    assert regions(memory) == {"leased": 1}
    loan.publish()
    clock.now = 109.0
    memory.tick()
    assert regions(memory) == {"leased": 1}


def test_unused_regions_are_freed_and_clients_told(
    memory: SharedMemory, session: Session, clock: Clock
) -> None:
    """A region that is free for a while is closed, and clients that mapped it are notified."""
    loan = lent(memory, session)
    memory.give_back(session, loan.region, loan.generation)
    clock.now = 11.0
    memory.tick()
    assert regions(memory) == {}
    assert session.channel.forgotten == [(loan.region, loan.generation)]


def test_share_and_limit_send_replies_through_the_network(
    memory: SharedMemory, session: Session
) -> None:
    """A client gets at most half of the memory; replies above this or the total are counted."""
    assert memory.lend(session, 8 * MIB + 1) is None
    lent(memory, session, 8 * MIB)
    assert memory.lend(session, 1) is None
    lent(memory, opened(memory), 8 * MIB)
    assert memory.lend(opened(memory), MIB) is None
    assert memory.state().fallbacks == {"share": 2, "limit": 1}


def test_client_has_few_enough_files_open(clock: Clock) -> None:
    """A client that keeps many small replies has half of the regions, including retired ones."""
    memory = SharedMemory(1024 * MIB, 10.0, clock=clock, regions=192)
    session = opened(memory)
    for turn in range(96):
        lent(memory, session, 1000)
        if turn == 50:
            clock.now = 11.0
            memory.tick()
    assert regions(memory) == {"leased": 45, "retired": 51}
    assert memory.lend(session, 1000) is None
    assert memory.borrow(session, 1000) is None
    assert memory.state().fallbacks == {"share": 1}
    assert not session.channel.closed
    other = opened(memory)
    assert memory.lend(other, 1000) is not None


@pytest.mark.parametrize("nbytes", [0, -1, MOST, MOST + 1])
def test_absurd_sizes_are_not_lent(memory: SharedMemory, session: Session, nbytes: int) -> None:
    """Size 0 and sizes above the total are refused, for replies and inputs."""
    assert memory.lend(session, nbytes) is None
    assert memory.borrow(session, nbytes) is None
    assert memory.state().bytes == {"leased": 0, "input": 0, "retired": 0, "free": 0}


def test_small_replies_are_not_lent(memory: SharedMemory, session: Session) -> None:
    """What is faster in the message stays there, and is not a fallback."""
    lent = SessionMemory(memory, session, least=1000)
    assert lent.lend(999) is None
    assert lent.lend(1000) is not None
    assert memory.state().fallbacks == {}


def test_client_that_takes_no_descriptor_is_sent_away(
    memory: SharedMemory, session: Session
) -> None:
    """If a client's socket is full, its reply is sent instead, and its session ends."""
    session.channel.full = True
    assert memory.lend(session, MIB) is None
    assert session.channel.closed
    assert memory.session(session.id) is None
    assert memory.state().fallbacks == {"socket": 1, "session": 1}


def test_refusals_of_the_system_are_fallbacks(clock: Clock) -> None:
    """If no region can be made, as without file descriptors, the reply is sent instead."""

    def refused(number: int, kind: RegionKind, size: int) -> Region:
        raise OSError(24, "Too many open files")

    memory = SharedMemory(16 * MIB, clock=clock, make=refused)
    assert memory.lend(opened(memory), MIB) is None
    assert memory.state().fallbacks == {"system": 1}


def test_sessions_are_bounded(memory: SharedMemory) -> None:
    """The 65th client is refused until another leaves; no two have the same id."""
    sessions = [opened(memory) for _ in range(64)]
    assert memory.open(Channel()) is None
    assert len({each.id for each in sessions}) == 64
    memory.close(sessions[0], End.REUSE)
    assert memory.open(Channel()) is not None


@pytest.fixture
def written(memory: SharedMemory, session: Session) -> SharedSlice:
    """An input of 4 bytes in a region of 64 KiB."""
    lease = memory.borrow(session, 4)
    mapped = map_region(lease.region.fileno(), RegionKind.INPUT, lease.region.size)
    mapped[8:12] = b"abcd"
    return SharedSlice(lease.region.number, lease.generation, 8, 4)


def test_input_is_copied_once(memory: SharedMemory, session: Session, written: SharedSlice) -> None:
    """What the server has read stays, whatever the client writes afterwards."""
    copy = memory.read(session, written)
    region = session.channel.regions[written.region]
    map_region(region.fileno(), RegionKind.INPUT, region.size)[8:12] = b"else"
    assert bytes(copy) == b"abcd"
    assert bytes(memory.read(session, written)) == b"else"
    assert bytes(memory.read(session, written._replace(size=0))) == b""


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 65537),
        (65536, 1),
        (65535, 2),
        (65537, 0),
        (MOST, 1),
        (MOST, MOST),
        (MOST - 3, 4),
        (1, MOST),
        (8, MOST - 7),
        (1 << 63, 1 << 63),
    ],
)
def test_bytes_outside_of_a_region_are_refused(
    memory: SharedMemory, session: Session, written: SharedSlice, offset: int, size: int
) -> None:
    """No offset and size, even if they overflow, reach outside the region."""
    with pytest.raises(InvalidInputError, match=f"got {size} bytes from {offset}, expected"):
        memory.read(session, written._replace(offset=offset, size=size))
    assert bytes(memory.read(session, written._replace(offset=65536, size=0))) == b""


def test_inputs_are_read_by_their_holder_only(
    memory: SharedMemory, session: Session, written: SharedSlice
) -> None:
    """Another client's region, a reply region, another generation and no session are refused."""
    reply = lent(memory, session)
    other = opened(memory)
    for who, at in (
        (other, written),
        (None, written),
        (session, written._replace(region=999)),
        (session, written._replace(generation=written.generation + 1)),
        (session, written._replace(generation=0)),
        (session, SharedSlice(reply.region, reply.generation, 0, 4)),
    ):
        with pytest.raises(SharedMemoryLostError):
            memory.read(who, at)
    assert bytes(memory.read(session, written)) == b"abcd"


def test_input_that_was_given_back_or_retired_is_refused(
    memory: SharedMemory, session: Session, written: SharedSlice, clock: Clock
) -> None:
    """A reference to an input whose lease was returned or has expired is refused."""
    later = memory.borrow(session, 4)
    memory.give_back(session, written.region, written.generation)
    with pytest.raises(SharedMemoryLostError, match="not an input region of this session"):
        memory.read(session, written)
    clock.now = 11.0
    memory.tick()
    with pytest.raises(SharedMemoryLostError):
        memory.read(session, SharedSlice(later.region.number, later.generation, 0, 4))


def test_reading_an_input_renews_its_lease(
    memory: SharedMemory, session: Session, written: SharedSlice, clock: Clock
) -> None:
    """An input region that is in use is not taken back."""
    for clock.now in (9.0, 18.0, 27.0):
        memory.read(session, written)
        memory.tick()
    assert bytes(memory.read(session, written)) == b"abcd"


def test_threads_lend_and_return_without_loss(memory: SharedMemory) -> None:
    """10,000 leases by four clients: no region is lent twice, and all are free in the end."""
    wrong: list[int] = []
    held: set[int] = set()

    def work(session: Session) -> None:
        for turn in range(2500):
            loan = memory.lend(session, 64 * 1024)
            if loan is None or loan.region in held:
                wrong.append(turn)
                return
            held.add(loan.region)
            if turn % 3:
                loan.publish()
            held.discard(loan.region)
            if turn % 3:
                memory.give_back(session, loan.region, loan.generation)

    threads = [threading.Thread(target=work, args=(opened(memory),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert wrong == []
    found = regions(memory)
    assert found == {"free": found["free"]}
    assert found["free"] <= 8
