"""A stream answers items as they finish, limits those in flight, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import torch

from gatednets import gate
from kept import kept
from layertap import Client
from layertap.app.server import FeatureServer
from layertap.engine import Engine, Limits
from layertap.models import ModelSpec
from layertap.v1 import feature_service_pb2, tensor_pb2
from processes import ENVIRONMENT
from serving import started_server
from streams import GATED_ITEM, Counting, RawStream, eventually, held_item, item, readers
from tinynets import ITEM

Code = grpc.StatusCode
PLACES = 4


# A held pass keeps its compute thread, and those behind it keep theirs: enough for all, so that
# only the streams' own bounds count; or one, so that held items queue.
@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with a compute thread for every item, and room for four items of a stream."""
    yield from loaded(PLACES + 2)


@pytest.fixture(scope="module")
def narrow() -> Iterator[Engine]:
    """The same with one compute thread."""
    yield from loaded(1)


def loaded(instances: int) -> Iterator[Engine]:
    engine = Engine(
        Limits(streams=2, stream_in_flight=PLACES), instances=instances, plan_cache=kept()
    )
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    engine.load(ModelSpec("gatednets:gated", item_shape=GATED_ITEM))
    yield engine
    engine.close()


@pytest.fixture
def seen() -> Counting:
    """The observer of the server."""
    return Counting()


@pytest.fixture
def server(engine: Engine, seen: Counting) -> Iterator[FeatureServer]:
    """A real server."""
    with started_server(engine, seen) as server:
        yield server


@pytest.fixture
def narrow_server(narrow: Engine, seen: Counting) -> Iterator[FeatureServer]:
    """A real server of the engine with one thread."""
    with started_server(narrow, seen) as server:
        yield server


@pytest.fixture
def channel(server: FeatureServer) -> Iterator[grpc.Channel]:
    """A channel to the server."""
    with grpc.insecure_channel(
        server.address, [("grpc.max_receive_message_length", -1)]
    ) as channel:
        yield channel


@pytest.fixture
def narrow_channel(narrow_server: FeatureServer) -> Iterator[grpc.Channel]:
    """A channel to the server with one compute thread."""
    with grpc.insecure_channel(narrow_server.address) as channel:
        yield channel


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test, however its streams ended, no item is pending and no reader is left."""
    name = "narrow" if "narrow" in request.fixturenames else "engine"
    engine: Engine = request.getfixturevalue(name)
    yield
    eventually(lambda: engine.pending == 0)
    eventually(lambda: not readers())


def eager(engine: Engine, x: np.ndarray) -> np.ndarray:
    """Return layer1's output from the plain module."""
    module = engine.host("residual").model.module
    x = torch.from_numpy(x)
    for child in ("conv1", "bn1", "relu", "layer1"):
        x = module.get_submodule(child)(x)
    return x.numpy()


def array(reply: feature_service_pb2.ExtractStreamResponse) -> np.ndarray:
    (tensor,) = reply.tensors
    return np.frombuffer(tensor.data, "<f4").reshape(tensor.shape)


def test_every_item_gets_its_own_answer(engine, channel, seen) -> None:
    """Each of many items in flight is answered once, with the values of the plain module."""
    random = np.random.default_rng(1)
    given = {n * 2**57 + n: random.random((n % 3 + 1, *ITEM), np.float32) for n in range(60)}
    stream = RawStream(channel)
    stream.send(*(item(number, x) for number, x in given.items()))
    replies = stream.rest()
    assert stream.call.code() is Code.OK
    assert sorted(reply.id for reply in replies) == sorted(given)
    for reply in replies:
        assert not reply.HasField("error")
        assert feature_service_pb2.ExtractStreamResponse.FromString(reply.SerializeToString())
        assert reply.timings.total_ns > 0
        assert np.array_equal(array(reply), eager(engine, given[reply.id]))
    assert seen.ends == {"residual OK": 60}


def test_the_time_of_an_item_begins_with_the_item(channel, seen) -> None:
    """A failed item is reported with its own caller, whose time is not the stream's."""
    stream = RawStream(channel)
    stream.send(item(1, model="nobody"))
    assert stream.read().error.code == Code.NOT_FOUND.value[0]
    later_ns = time.perf_counter_ns()
    stream.send(item(2, model="nobody"), item(3))
    assert {reply.id for reply in stream.rest()} == {2, 3}
    begun = [caller.call.started_ns for caller in seen.callers]
    assert begun[0] < later_ns
    assert min(begun[1:]) > later_ns
    assert {caller.in_stream for caller in seen.callers} == {True}
    assert len({caller.request_id for caller in seen.callers}) == 1


def test_a_quick_item_overtakes_a_slow_one(channel) -> None:
    """Replies are sent as items finish, not in the order of the requests."""
    stream = RawStream(channel)
    with gate() as held:
        stream.send(held_item(1), item(2))
        assert stream.read().id == 2
        held.open()
        assert stream.read().id == 1
    assert stream.rest() == []


BAD = {
    "unknown model": (item(5, model="nobody"), Code.NOT_FOUND, "ModelNotFoundError"),
    "misspelt layer": (
        item(5, layers=[feature_service_pb2.LayerSelection(layer="layer_1")]),
        Code.NOT_FOUND, "LayerNotFoundError",
    ),
    "no input": (
        feature_service_pb2.ExtractStreamRequest(id=5, model="residual"),
        Code.INVALID_ARGUMENT, "InvalidInputError",
    ),
    "unknown extractor": (item(5, extractor=99), Code.INVALID_ARGUMENT, "InvalidInputError"),
    "a tensor that contradicts itself": (
        item(5, inputs=[tensor_pb2.Tensor(dtype=1, shape=[1, *ITEM], data=b"1234")]),
        Code.INVALID_ARGUMENT, "DecodeError",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_item_leaves_the_others_alone(engine, channel, seen, case) -> None:
    """An item's error has a status and a class, and ends neither the stream nor other items."""
    bad, code, kind = BAD[case]
    stream = RawStream(channel)
    stream.send(item(1), bad, item(2))
    replies = {reply.id: reply for reply in stream.rest()}
    assert stream.call.code() is Code.OK
    assert set(replies) == {1, 2, 5}
    error = replies[5].error
    assert (error.code, error.kind) == (code.value[0], kind)
    assert error.message
    assert list(replies[5].tensors) == []
    assert np.array_equal(array(replies[2]), eager(engine, np.full((1, *ITEM), 2, np.float32)))
    assert sum(seen.ends.values()) == 3
    assert seen.ends["residual OK"] == 2


def test_an_id_in_flight_is_taken(channel) -> None:
    """A second item with an id in flight is refused; once the first is answered the id is free."""
    stream = RawStream(channel)
    with gate() as held:
        stream.send(held_item(7), item(7))
        refused = stream.read()
        assert (refused.id, refused.error.code) == (7, Code.INVALID_ARGUMENT.value[0])
        assert "id: got 7" in refused.error.message
        held.open()
        assert not stream.read().HasField("error")
    for _ in range(20):
        stream.send(item(7))
        assert not stream.read().HasField("error")
    assert stream.rest() == []


@pytest.mark.parametrize(
    "message",
    [b"\xff\xff\xff", b"\x0a\x05ab", pytest.param(b"\x22\x00" * 70_000, id="too many fields")],
)
def test_bytes_that_are_no_request_end_the_stream(channel, message) -> None:
    """Without an id nothing can be answered: earlier items are answered, and the stream ends."""
    stream = RawStream(channel)
    with gate() as held:
        stream.send(held_item(1), message, item(2))
        held.arrived()
        held.open()
        assert stream.read().id == 1
        assert stream.failure() is Code.INVALID_ARGUMENT
    metadata = dict(stream.call.trailing_metadata())
    assert metadata["layertap-error"] == "DecodeError"


def test_after_the_half_close_what_is_in_flight_is_answered(channel) -> None:
    """A client that has sent its last message still gets every answer, then OK."""
    stream = RawStream(channel)
    with gate() as held:
        stream.send(held_item(1), item(2), held_item(3))
        stream.half_close()
        assert stream.read().id == 2
        held.open()
        assert {stream.read().id, stream.read().id} == {1, 3}
    assert stream.failure() is Code.OK


def test_no_more_than_the_limit_is_in_flight(engine, channel, seen) -> None:
    """Further items are read only as others are answered; other callers are served meanwhile."""
    stream = RawStream(channel)
    other = RawStream(channel)
    with gate() as held:
        stream.send(*(held_item(number) for number in range(PLACES)), *map(item, range(50, 60)))
        held.arrived()
        eventually(lambda: engine.pending == PLACES)
        for number in range(10):
            other.send(item(number))
            assert other.read().id == number
        # Were another item read, it would have overtaken the other stream's.
        assert seen.ends == {"residual OK": 10}
        held.open()
        assert len(stream.rest()) == PLACES + 10
    assert other.rest() == []


def test_a_client_that_does_not_read_is_not_read_from(narrow_server, narrow_channel, seen) -> None:
    """Replies that the client doesn't read keep their places, so the server's memory is bounded."""
    # Replies of 2 MB and a window of 64 KB: gRPC takes none of them before it is read.
    large = np.zeros((16, 3, 128, 128), np.float32)
    count = 3 * PLACES
    options = [("grpc.max_receive_message_length", -1), ("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(narrow_server.address, options) as unread:
        stream = RawStream(unread)
        stream.send(*(item(number, large) for number in range(count)))
        seen.wait("residual OK", PLACES)
        other = RawStream(narrow_channel)
        for number in range(10):
            other.send(item(number))
            assert other.read().id == number
        # Were more of them read, the one compute thread would have run them before the last of
        # the others.
        assert seen.ends == {"residual OK": PLACES + 10}
        assert other.rest() == []
        assert {reply.id for reply in stream.rest()} == set(range(count))


def test_a_cancelled_stream_is_not_computed(narrow, narrow_channel, seen) -> None:
    """Items that wait behind a running one are dropped when the client cancels."""
    stream = RawStream(narrow_channel)
    with gate() as held:
        stream.send(*(held_item(number) for number in range(PLACES)))
        held.arrived()
        eventually(lambda: narrow.pending == PLACES)
        stream.call.cancel()
        stream.half_close()
        # Before the gate opens: only what runs is left.
        eventually(lambda: narrow.pending == 1)
        seen.wait("gated CANCELLED", PLACES - 1)
        held.open()
        eventually(lambda: narrow.pending == 0)
        assert held.passed == 1


KILLED = """
import sys
import grpc
from serving import started_server
from streams import RawStream, held_item
stream = RawStream(grpc.insecure_channel(sys.argv[1]))
stream.send(*(held_item(number) for number in range(4)))
stream.read()
"""


def test_a_killed_client_leaves_nothing(narrow, narrow_server) -> None:
    """When the client's process dies, its waiting items are dropped and its threads end."""
    with gate() as held:
        client = subprocess.Popen(
            [sys.executable, "-c", KILLED, narrow_server.address], env=ENVIRONMENT
        )
        try:
            held.arrived()
            eventually(lambda: narrow.pending == PLACES)
            assert len(readers()) == 1
        finally:
            client.kill()
            client.wait(60)
        eventually(lambda: not readers())
        eventually(lambda: narrow.pending == 1)
        held.open()
        eventually(lambda: narrow.pending == 0)
        assert held.passed == 1


def test_the_streams_deadline_is_that_of_its_items(narrow, narrow_channel) -> None:
    """A stream whose deadline passes ends, and its waiting items are not run."""
    with gate() as held:
        stream = RawStream(narrow_channel, timeout=2)
        stream.send(*(held_item(number) for number in range(PLACES)))
        held.arrived()
        # The items' time is up as well, and their errors may come before the stream's.
        late: list[int] = []
        with pytest.raises(grpc.RpcError) as failure:
            late.extend(reply.error.code for reply in stream.call)
        assert failure.value.code() is Code.DEADLINE_EXCEEDED
        assert set(late) <= {Code.DEADLINE_EXCEEDED.value[0]}
        stream.half_close()
        eventually(lambda: narrow.pending == 0)
        held.open()
        eventually(lambda: held.passed == 1)


def test_an_items_timeout_is_its_own(channel) -> None:
    """An item over its timeout is answered with DEADLINE_EXCEEDED, and the stream continues."""
    stream = RawStream(channel)
    with gate() as held:
        stream.send(held_item(1))
        held.arrived()
        stream.send(held_item(2, timeout_ns=1_000_000))
        late = stream.read()
        assert (late.id, late.error.code) == (2, Code.DEADLINE_EXCEEDED.value[0])
        assert late.error.kind == "DeadlineExceededError"
        held.open()
        assert stream.read().id == 1
    assert stream.rest() == []


def test_more_streams_than_allowed_are_refused(channel) -> None:
    """One stream too many is refused; when another ends, there is room again."""
    first, second = RawStream(channel), RawStream(channel)
    for stream in (first, second):
        stream.send(item(1))
        assert stream.read().id == 1
    assert RawStream(channel).failure() is Code.RESOURCE_EXHAUSTED
    assert first.rest() == []
    eventually(lambda: len(readers()) == 1)
    third = RawStream(channel)
    third.send(item(3))
    assert third.read().id == 3
    assert (third.rest(), second.rest()) == ([], [])


def test_draining_answers_what_is_in_flight(server, channel) -> None:
    """When the server stops, items in flight are answered, and the streams end with UNAVAILABLE."""
    busy, idle = RawStream(channel), RawStream(channel)
    idle.send(item(1))
    assert idle.read().id == 1
    with gate() as held:
        busy.send(held_item(1))
        held.arrived()
        stopping = threading.Thread(target=server.stop, args=(60,))
        stopping.start()
        assert idle.failure() is Code.UNAVAILABLE
        assert "shutting down" in idle.call.details()
        busy.send(item(2))
        held.open()
        assert busy.read().id == 1
        assert busy.failure() is Code.UNAVAILABLE
        stopping.join(60)
        assert not stopping.is_alive()


def test_streams_leave_room_for_unary_calls(engine, seen) -> None:
    """With as many open streams as allowed, unary calls are still served."""
    with (
        started_server(engine, seen) as server,
        grpc.insecure_channel(server.address) as channel,
        Client(server.address) as client,
    ):
        streams = [RawStream(channel), RawStream(channel)]
        for stream in streams:
            stream.send(item(1))
            assert stream.read().id == 1
        x = np.zeros((1, *ITEM), np.float32)
        assert "layer1" in client.extract("residual", x, "layer1", timeout=60)
        assert [stream.rest() for stream in streams] == [[], []]
