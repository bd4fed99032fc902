"""All protocols run requests in one way, which releases what they took and reports how they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from asking import request_for
from layertap import errors
from layertap.engine import (
    Call,
    Engine,
    Extraction,
    ExtractionRequest,
    Limits,
    ModelHost,
    Reservation,
)
from layertap.models import ModelSpec
from layertap.services.data_plane import Converted, DataPlane
from layertap.services.unary import answer
from streams import Counting
from tinynets import ITEM

WANTED = request_for("residual", "layer1", np.zeros((1, *ITEM), np.float32))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with room for a few requests."""
    engine = Engine(Limits(pending_bytes=10_000))
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    yield engine
    engine.close()


@pytest.fixture
def seen() -> Counting:
    """The observer."""
    return Counting()


@pytest.fixture
def plane(engine: Engine, seen: Counting) -> DataPlane:
    """The data plane."""
    return DataPlane(engine, seen)


class Context:
    """An RPC as far as ``answer`` knows it: one that goes on, or has ended already."""

    def __init__(self, *, ended: bool) -> None:
        self.callbacks: list[Callable[[], None]] = []
        self._ended = ended

    def add_callback(self, callback: Callable[[], None]) -> bool:
        if not self._ended:
            self.callbacks.append(callback)
        return not self._ended

    def time_remaining(self) -> float | None:
        return None


def test_the_request_is_released_and_the_reply_is_its_owners(engine, plane, seen) -> None:
    """Once there is a reply the request counts no more; the reply does until it was sent."""
    counted: list[int] = []

    def convert(message: bytes, received: Reservation) -> Converted:
        counted.append(received.nbytes)
        return "residual", WANTED

    message = bytes(3000)
    extraction = plane.extract(message, lambda same: same, convert, Call())
    assert counted == [3000]
    assert engine.pending_bytes == len(extraction.payload)
    assert seen.ends == {"residual OK": 1}
    extraction.release()
    assert engine.pending_bytes == 0


def test_a_version_may_have_a_say_in_the_request(engine, plane) -> None:
    """A request that is a function of the version is called with the one that serves it."""
    asked: list[str] = []

    def request_for(host: ModelHost) -> ExtractionRequest:
        asked.append(host.model.name)
        return WANTED

    plane.run(plane.receive(3000), Call(), lambda: ("residual", request_for)).release()
    assert asked == ["residual"]


def test_a_unary_reply_is_released_when_its_rpc_ends(engine, plane) -> None:
    """gRPC's callbacks cancel the call and release the reply, which counts until then."""
    calls: list[Call] = []

    def extract(call: Call) -> Extraction:
        calls.append(call)
        return plane.run(plane.receive(3000), call, lambda: ("residual", WANTED))

    going_on = Context(ended=False)
    message = answer(going_on, extract)
    assert engine.pending_bytes == len(message)
    for callback in going_on.callbacks:
        callback()
    assert engine.pending_bytes == 0
    with pytest.raises(errors.CancelledError):
        calls[0].check()


def test_an_rpc_that_has_ended_is_cancelled_and_released_at_once(engine, plane) -> None:
    """gRPC does not call back for it, neither before the extraction nor after it."""
    with pytest.raises(errors.CancelledError):
        answer(
            Context(ended=True),
            lambda call: plane.run(plane.receive(3000), call, lambda: ("residual", WANTED)),
        )
    assert engine.pending_bytes == 0
    ends_meanwhile = Context(ended=False)

    def extract(call: Call) -> Extraction:
        ends_meanwhile._ended = True
        return plane.run(plane.receive(3000), call, lambda: ("residual", WANTED))

    answer(ends_meanwhile, extract)
    assert engine.pending_bytes == 0


def test_a_request_that_fails_is_released_and_reported(engine, plane, seen) -> None:
    """Wherever it fails: before it is parsed, at the look-up of its model, or in the engine."""
    layer = request_for("residual", "nothing", np.zeros((1, *ITEM), np.float32))
    gone = Call()
    gone.cancel()
    for call, name, wanted, error in (
        (gone, "residual", WANTED, errors.CancelledError),
        (Call(), "nobody", WANTED, errors.ModelNotFoundError),
        (Call(), "residual", layer, errors.LayerNotFoundError),
    ):
        received = plane.receive(3000)
        with pytest.raises(error):
            plane.run(received, call, lambda n=name, w=wanted: (n, w))
        assert (received.nbytes, engine.pending_bytes) == (0, 0)
    assert seen.ends == {" CANCELLED": 1, " NOT_FOUND": 1, "residual NOT_FOUND": 1}


def test_a_request_that_does_not_fit_is_reported(engine, plane, seen) -> None:
    """It is refused before anything is made of it, and nothing of it stays counted."""
    with pytest.raises(errors.OverloadedError, match="the request takes 20000 bytes"):
        plane.receive(20_000)
    assert engine.pending_bytes == 0
    assert seen.ends == {" RESOURCE_EXHAUSTED": 1}
