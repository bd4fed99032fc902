"""All protocols run requests in the same way: bytes are released and outcomes are reported."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from asking import request_for
from kept import kept
from layertap import errors
from layertap.engine import (
    Engine,
    ExtractionRequest,
    Limits,
    ModelHost,
    Reservation,
)
from layertap.models import ModelSpec
from layertap.services.answer import Answer
from layertap.services.caller import Caller
from layertap.services.data_plane import Converted, DataPlane
from layertap.services.grpc_adapter.handlers import unary
from serving import FakeContext, serving_method
from streams import Counting, eventually
from tinynets import ITEM

WANTED = request_for("residual", "layer1", np.zeros((1, *ITEM), np.float32))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with room for a few requests."""
    engine = Engine(Limits(pending_bytes=10_000), plan_cache=kept())
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


def test_the_request_is_released_and_the_reply_is_its_owners(engine, plane, seen) -> None:
    """Once there is a reply, only the reply's bytes count, until it was sent."""
    counted: list[int] = []

    def convert(message: bytes, received: Reservation) -> Converted:
        counted.append(received.nbytes)
        return "residual", WANTED

    message = bytes(3000)
    extraction = plane.extract(message, lambda same: same, convert, Caller())
    assert counted == [3000]
    assert engine.pending_bytes == len(extraction.payload)
    assert seen.ends == {"residual OK": 1}
    extraction.release()
    assert engine.pending_bytes == 0


def test_a_version_may_have_a_say_in_the_request(engine, plane) -> None:
    """If the request is a function of the version, it is called with the serving version."""
    asked: list[str] = []

    def request_for(host: ModelHost) -> ExtractionRequest:
        asked.append(host.model.name)
        return WANTED

    caller = Caller()
    plane.run(plane.receive(3000, caller), caller, lambda: ("residual", request_for)).release()
    assert asked == ["residual"]


def test_a_unary_reply_counts_until_its_rpc_ends(engine, plane) -> None:
    """The bytes of a reply are released once gRPC has ended the RPC, and not earlier."""
    counted: list[int] = []

    def handle(message: bytes, caller: Caller) -> Answer:
        received = plane.receive(3000, caller)
        extraction = plane.run(received, caller, lambda: ("residual", WANTED))
        caller.call.cancelling(lambda: counted.append(engine.pending_bytes)).__enter__()
        return Answer(extraction.payload, extraction.reservation)

    with serving_method(unary(handle)) as channel:
        message = channel.unary_unary("/test.Service/Call")(b"")
        eventually(lambda: engine.pending_bytes == 0)
    # The call is cancelled first, at the same end of the RPC.
    assert counted == [len(message)]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_an_rpc_that_has_ended_is_cancelled_and_released_at_once(engine, plane, when) -> None:
    """gRPC doesn't call back then: the caller is cancelled, and the reply is released."""
    context = FakeContext(ended=when == "before")
    kept: list[object] = []  # So that no finalizer releases what the handler's end should release.

    def handle(message: bytes, caller: Caller) -> Answer:
        received = plane.receive(3000, caller)
        extraction = plane.run(received, caller, lambda: ("residual", WANTED))
        context.ended = True
        kept.append(extraction)
        assert engine.pending_bytes == len(extraction.payload)
        return Answer(extraction.payload, extraction.reservation)

    behaviour = unary(handle).unary_unary
    with ThreadPoolExecutor(1) as pool:  # In a thread that serves nobody yet.
        served = pool.submit(behaviour, b"", context)
    if when == "before":
        with pytest.raises(RuntimeError, match="CANCELLED"):
            served.result()
    else:
        served.result()
    assert engine.pending_bytes == 0


def test_a_request_that_fails_is_released_and_reported(engine, plane, seen) -> None:
    """This holds before parsing, when its model is looked up, and in the engine."""
    layer = request_for("residual", "nothing", np.zeros((1, *ITEM), np.float32))
    gone = Caller()
    gone.call.cancel()
    for caller, name, wanted, error in (
        (gone, "residual", WANTED, errors.CancelledError),
        (Caller(), "nobody", WANTED, errors.ModelNotFoundError),
        (Caller(), "residual", layer, errors.LayerNotFoundError),
    ):
        received = plane.receive(3000, caller)
        with pytest.raises(error):
            plane.run(received, caller, lambda n=name, w=wanted: (n, w))
        assert (received.nbytes, engine.pending_bytes) == (0, 0)
    assert seen.ends == {" CANCELLED": 1, " NOT_FOUND": 1, "residual NOT_FOUND": 1}


def test_a_request_that_does_not_fit_is_reported(engine, plane, seen) -> None:
    """It is refused before it is parsed, and none of its bytes stay counted."""
    with pytest.raises(errors.OverloadedError, match="the request takes 20000 bytes"):
        plane.receive(20_000, Caller())
    assert engine.pending_bytes == 0
    assert seen.ends == {" RESOURCE_EXHAUSTED": 1}
