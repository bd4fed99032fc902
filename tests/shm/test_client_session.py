"""The client's end of the socket: lent memory stays intact, and is returned in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from layertap.shm.broker import Broker
from layertap.shm.client_session import ClientSession
from layertap.shm.leases import Session
from layertap.shm.regions import supported
from layertap.shm.shared_memory import SharedMemory
from layertap.wire.dtypes import by_name
from layertap.wire.tensors import SharedSlice, SharedTensor

pytestmark = pytest.mark.skipif(not supported(), reason="shared memory is Linux's")

MIB = 1 << 20


@pytest.fixture
def broker() -> Iterator[Broker]:
    """A broker of 16 MiB with leases of a minute."""
    broker = Broker(SharedMemory(16 * MIB))
    broker.start()
    yield broker
    broker.close()


def connected(broker: Broker) -> tuple[ClientSession, Session]:
    connection = ClientSession(broker.name, broker.ticket())
    session = broker.memory.session(connection.session)
    assert session is not None
    return connection, session


def replied(broker: Broker, session: Session, byte: bytes) -> SharedTensor:
    """Write a reply of 1 MiB and return what its message says about it."""
    loan = broker.memory.lend(session, MIB)
    assert loan is not None
    loan.buffer[:] = byte * MIB
    at = SharedSlice(loan.region, loan.generation, 0, MIB)
    loan.publish()
    return SharedTensor("x", by_name("uint8"), (MIB,), at)


def eventually(condition: Callable[[], bool]) -> bool:
    """Wait until another thread has handled something."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_a_reply_that_is_being_read_outlives_the_close(broker: Broker) -> None:
    """A client that is closed while a thread reads a reply ends its session afterwards."""
    connection, session = connected(broker)
    other, others = connected(broker)
    connection.begin_call()
    tensor = replied(broker, session, b"a")
    assert eventually(lambda: tensor.at.region in connection._regions)
    with connection._changed:  # Whatever it hears of the end comes later.
        connection.close()
        view = connection.finder()(tensor)
    connection.end_call()
    time.sleep(0.1)
    replied(broker, others, b"b")
    assert bytes(view.data[:1]) == b"a"
    del view
    assert eventually(lambda: broker.memory.state().sessions == 1)
    other.close()


def test_regions_that_others_had_last_are_let_go_of_at_once(broker: Broker) -> None:
    """A long call keeps regions that may hold its reply, but none that others had last."""
    connection, session = connected(broker)
    other, others = connected(broker)
    for client, whose in ((connection, session), (other, others)):
        tensor = replied(broker, whose, b"x")
        client.finder()(tensor)
        assert eventually(lambda: broker.memory.state().regions["leased"] == 0)
    connection.begin_call()
    broker.memory._pool.reap(time.monotonic() + 1)
    assert eventually(lambda: not other._regions)
    assert eventually(lambda: not connection._regions)
    connection.end_call()
    for client in (connection, other):
        client.close()
