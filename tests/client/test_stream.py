"""The client's streams keep a limited number of items in flight and yield each item's outcome."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from gatednets import HELD, gate
from kept import kept
from layertap import Client, Features, StreamRequest, errors
from layertap.app.server import FeatureServer
from layertap.engine import Engine, Limits
from layertap.models import ModelSpec
from serving import started_server
from streams import GATED_ITEM, eventually, readers
from tinynets import ITEM

IN_FLIGHT = 4


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with a compute thread for every item, so that a blocked item blocks no other."""
    engine = Engine(Limits(streams=2), instances=IN_FLIGHT + 1, plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    engine.load(ModelSpec("gatednets:gated", item_shape=GATED_ITEM))
    yield engine
    engine.close()


@pytest.fixture
def server(engine: Engine) -> Iterator[FeatureServer]:
    """The address of a real server."""
    with started_server(engine) as server:
        yield server


@pytest.fixture
def client(server: FeatureServer) -> Iterator[Client]:
    """A client of that server."""
    with Client(server.address) as client:
        yield client


@pytest.fixture(autouse=True)
def _nothing_is_left(engine: Engine) -> Iterator[None]:
    """After each test, no item is pending and no stream is open."""
    yield
    eventually(lambda: engine.pending == 0)
    eventually(lambda: not readers())


def batches(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(4)
    return [random.random((1, *ITEM), np.float32) for _ in range(count)]


def held(**fields: object) -> StreamRequest:
    x = np.full((1, *GATED_ITEM), HELD, np.float32)
    # A compiled plan would have no gate.
    return StreamRequest("gated", x, "conv", extractor="hook", **fields)


class Counted:
    """Inputs that count how many were read."""

    def __init__(self, inputs: list[object]) -> None:
        self._inputs = inputs
        self.taken = 0

    def __iter__(self) -> Iterator[object]:
        for each in self._inputs:
            self.taken += 1
            yield each


def test_many_come_in_order(client) -> None:
    """Features are yielded in the order of the inputs, and are equal to those of separate calls."""
    given = batches(50)
    many = list(client.extract_many("residual", given, ["bn1", "layer1=deep"], extractor="hook"))
    assert len(many) == 50
    for x, features in zip(given, many, strict=True):
        alone = client.extract("residual", x, ["bn1", "layer1=deep"], extractor="hook")
        assert list(features) == ["bn1", "deep"]
        assert features.extractor == "hook"
        assert all(np.array_equal(features[name], alone[name]) for name in alone)


def test_many_as_they_finish(client) -> None:
    """Without an order, every item is yielded exactly once."""
    given = [np.full((1, *ITEM), value, np.float32) for value in range(20)]
    got = client.extract_many("residual", given, "conv1:input", ordered=False)
    assert sorted(float(features["conv1:input"].max()) for features in got) == list(range(20))


def test_keys_tell_items_apart(client) -> None:
    """An outcome has the item's key, or its position; quick items overtake slow ones."""
    (x,) = batches(1)
    with gate() as closed, client.stream() as stream:
        asked = [held(key="slow"), StreamRequest("residual", x, "layer1")]
        outcomes = stream.extract(asked)
        key, outcome = next(outcomes)
        assert (key, list(outcome)) == (1, ["layer1"])
        closed.open()
        key, outcome = next(outcomes)
        assert (key, list(outcome)) == ("slow", ["conv"])
        assert next(outcomes, None) is None
        # The stream is there for more.
        assert [key for key, _ in stream.extract([StreamRequest("residual", x, "fc")])] == [0]


@pytest.mark.parametrize("ordered", [True, False])
def test_two_iterators_of_a_stream_take_their_own(client, ordered) -> None:
    """An outcome that another iterator receives is kept for the iterator that it belongs to."""
    given = [np.full((1, *ITEM), value, np.float32) for value in range(20)]
    with client.stream(max_in_flight=3) as stream:
        halves = [
            stream.extract(
                [StreamRequest("residual", x, "conv1:input", key=float(x.max())) for x in half],
                ordered=ordered,
            )
            for half in (given[:10], given[10:])
        ]
        pairs = [pair for both in zip(*halves, strict=True) for pair in both]
    assert sorted(key for key, _ in pairs) == list(range(20))
    assert all(float(features["conv1:input"].max()) == key for key, features in pairs)


@pytest.mark.parametrize("ordered", [True, False])
def test_inputs_are_read_no_further_than_allowed(client, ordered) -> None:
    """Only a limited number of inputs are read and not yet yielded, in any order of finishing."""
    (x,) = batches(1)
    given = Counted([held(), *[StreamRequest("residual", x, "layer1")] * 20])
    with gate() as closed, client.stream(max_in_flight=IN_FLIGHT) as stream:
        outcomes = stream.extract(given, ordered=ordered)
        if ordered:
            closed.open()
        for yielded in range(1, 10):
            next(outcomes)
            assert given.taken - yielded < IN_FLIGHT
        closed.open()
        assert len(list(outcomes)) == 21 - 9


def test_a_bad_item_is_an_outcome(client) -> None:
    """The item's error is yielded in its place, as the class that the server or client names."""
    (x,) = batches(1)
    asked = [
        StreamRequest("residual", x, "layer1"),
        StreamRequest("nobody", x, "layer1"),
        StreamRequest("residual", x, "layer_1"),
        StreamRequest("residual", "/no/such/photo.jpg", "layer1"),
        StreamRequest("residual", Image.new("F", (16, 16)), "layer1"),
        StreamRequest("residual", x, "layer1", extractor="hok"),
        StreamRequest("residual", x, "layer1.0", extractor="children"),
        StreamRequest("residual", x, "layer1"),
    ]
    with client.stream() as stream:
        outcomes = [outcome for _, outcome in stream.extract(asked, ordered=True)]
    assert [type(outcome) for outcome in outcomes] == [
        Features,
        errors.ModelNotFoundError,
        errors.LayerNotFoundError,
        errors.InvalidInputError,
        errors.InvalidInputError,
        errors.InvalidInputError,
        errors.ExtractorUnsupportedError,
        Features,
    ]
    assert "'nobody', served models" in str(outcomes[1])
    assert "No such file" in str(outcomes[3])


def test_errors_are_raised_or_yielded(client) -> None:
    """By default the first error ends the iteration; with ``return_errors`` it is yielded."""
    good, bad = batches(1)[0], np.zeros((1, 4, 16, 16), np.float32)
    many = client.extract_many("residual", [good, bad, good], "layer1")
    assert isinstance(next(many), Features)
    with pytest.raises(errors.InvalidInputError, match=r"expected \[B, 3, H, W\]"):
        next(many)
    assert next(many, None) is None
    kept = client.extract_many("residual", [good, bad, good], "layer1", return_errors=True)
    assert [type(each) for each in kept] == [Features, errors.InvalidInputError, Features]


def test_stopping_early_closes_the_stream(engine, client) -> None:
    """If the consumer stops early, nothing keeps running, and the stream accepts no more items."""
    (x,) = batches(1)
    with gate() as closed:
        with client.stream() as stream:
            outcomes = stream.extract([StreamRequest("residual", x, "layer1"), *[held()] * 3])
            next(outcomes)
            closed.arrived()
            outcomes.close()
            eventually(lambda: not readers())
            with pytest.raises(errors.UnavailableError, match="closed"):
                next(stream.extract([]))
        many = client.extract_many("residual", [x] * 9, "layer1")
        next(many)
        many.close()
        eventually(lambda: not readers())


def test_an_items_time(client) -> None:
    """An item over its own time limit is an outcome; so is one over the stream's item limit."""
    with gate() as closed, client.stream(item_timeout=60) as stream:
        outcomes = stream.extract([held(), held(timeout=0.001)])
        key, outcome = next(outcomes)
        assert (key, type(outcome)) == (1, errors.DeadlineExceededError)
        closed.open()
        assert next(outcomes)[0] == 0


def test_a_streams_time(client) -> None:
    """A stream over its time limit raises, even with items in flight."""
    with gate(), client.stream(timeout=1) as stream:
        outcomes = stream.extract([held()])
        with pytest.raises(errors.DeadlineExceededError):
            # The item's time is up with the stream's, and may be told first.
            raise next(outcomes)[1]
        outcomes.close()


def test_a_server_that_stops_is_unavailable(server, client) -> None:
    """Items in flight are answered, then the stream raises; unanswered items have no outcome."""
    (x,) = batches(1)
    stopping = threading.Thread(target=server.stop, args=(60,))

    def asked() -> Iterator[StreamRequest]:
        yield StreamRequest("residual", x, "layer1")
        yield held()
        closed.arrived()
        stopping.start()

    with gate() as closed, client.stream() as stream:
        outcomes = stream.extract(asked())
        assert next(outcomes)[0] == 0
        closed.open()
        assert next(outcomes)[0] == 1
        stopping.join(60)
        with pytest.raises(errors.UnavailableError):
            next(stream.extract([StreamRequest("residual", x, "layer1")]))


def test_nobody_at_the_address_is_unavailable() -> None:
    """If no server runs at the address, UnavailableError is raised, not a gRPC exception."""
    with Client("127.0.0.1:1", timeout=5) as client, pytest.raises(errors.UnavailableError):
        list(client.extract_many("residual", batches(1), "layer1"))


def test_nothing_in_flight_is_refused(client) -> None:
    """A stream with no items allowed in flight raises InvalidInputError."""
    with pytest.raises(errors.InvalidInputError, match="max_in_flight"):
        client.stream(max_in_flight=0)
    assert list(client.extract_many("residual", [], "layer1")) == []
