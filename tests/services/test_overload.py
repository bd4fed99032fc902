"""A full server refuses calls before it reads them, at a limited rate."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from gatednets import HELD as HELD_INPUT
from gatednets import Gate, gate
from kept import kept
from layertap import Client
from layertap.app.metrics import Metrics
from layertap.app.server import FeatureServer, ServerOptions
from layertap.engine import Engine, Limits
from layertap.errors import OverloadedError
from layertap.models import ModelSpec
from layertap.services.grpc_adapter import overload
from layertap.services.grpc_adapter.overload import (
    AT_ONCE,
    HELD,
    HELD_SECONDS,
    HeldRefusals,
    Overload,
)

EXTRACT = "/layertap.v1.FeatureService/Extract"
ITEM = (3, 4, 4)


class Clock:
    """A clock that advances only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Refused:
    """Records what ran, in order."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self._changed = threading.Condition()

    def __call__(self, number: int) -> None:
        with self._changed:
            self.done.append(number)
            self._changed.notify_all()

    def wait_for(self, count: int) -> list[int]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.done) >= count, 20)
            return list(self.done)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def refusals(clock: Clock) -> Iterator[HeldRefusals]:
    refusals = HeldRefusals(clock)
    refusals.start()
    yield refusals
    refusals.shutdown()


def test_a_few_refusals_are_sent_at_once_and_the_rest_later(
    clock: Clock, refusals: HeldRefusals
) -> None:
    """As many as allowed per second are sent at once; the others are delayed, and sent in order."""
    refused = Refused()
    futures = [refusals.submit(refused, number) for number in range(AT_ONCE + 5)]
    assert refused.wait_for(AT_ONCE) == list(range(AT_ONCE))
    time.sleep(0.05)
    assert len(refused.done) == AT_ONCE
    clock.now += HELD_SECONDS / 2
    refusals.submit(refused, 99)  # Half a second allows some more.
    assert refused.wait_for(AT_ONCE + 1)[-1] == 99
    clock.now += HELD_SECONDS
    refusals.submit(refused, 100)
    assert sorted(refused.wait_for(AT_ONCE + 7)[-6:]) == [*range(AT_ONCE, AT_ONCE + 5), 100]
    assert all(future.result(10) is None for future in futures)


def test_the_stop_sends_what_is_held(refusals: HeldRefusals) -> None:
    """When a server stops, nobody waits for a refusal."""
    refused = Refused()
    for number in range(AT_ONCE + 3):
        refusals.submit(refused, number)
    refusals.drain()
    assert len(refused.wait_for(AT_ONCE + 3)) == AT_ONCE + 3
    refusals.submit(refused, 99)
    assert refused.wait_for(AT_ONCE + 4)[-1] == 99


def test_no_more_than_a_bounded_number_is_held(refusals: HeldRefusals) -> None:
    """Above this number a refusal is sent at once, because delayed refusals take memory."""
    refused = Refused()
    for number in range(AT_ONCE + HELD + 7):
        refusals.submit(refused, number)
    # Those that were to be sent at once count as held for as long as the thread is behind.
    assert AT_ONCE + 7 <= len(refused.wait_for(AT_ONCE + 7)) <= 2 * AT_ONCE + 7


def test_a_refusal_that_fails_does_not_end_the_thread(refusals: HeldRefusals) -> None:
    """An error belongs to its future, and the next refusal is sent."""

    def fails() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        refusals.submit(fails).result(10)
    assert refusals.submit(lambda: 5).result(10) == 5


class Counting:
    """An interceptor over an engine that has only counts."""

    def __init__(self, clock: Clock, pending: int) -> None:
        self.engine: Any = SimpleNamespace(pending=0, limits=Limits(pending=pending))
        self.overload = Overload(self.engine, Metrics(), clock)
        self.handler = grpc.unary_unary_rpc_method_handler(lambda message, context: message)

    def arrive(self, method: str = EXTRACT) -> grpc.RpcMethodHandler | None:
        """Return the handler of a call that arrives; None for a refusal."""
        details: Any = SimpleNamespace(method=method, invocation_metadata=())
        handler = self.overload.intercept_service(lambda _: self.handler, details)
        assert handler is not None
        return handler if handler.unary_unary is not None else None


def test_calls_that_are_being_received_take_places(clock: Clock) -> None:
    """Calls count from arrival to end; other methods are not counted."""
    counting = Counting(clock, 2)
    first, second = counting.arrive(), counting.arrive()
    assert first is not None
    assert second is not None
    assert counting.arrive() is None
    assert counting.arrive("/layertap.v1.FeatureService/ListModels") is counting.handler
    assert first.unary_unary(b"x", None) == b"x"
    assert counting.arrive() is not None
    assert counting.arrive() is None


def test_a_call_keeps_its_place_while_it_runs(clock: Clock) -> None:
    """A running call is counted once, whether or not the engine counts it already."""
    counting = Counting(clock, 2)
    outcomes: list[bool] = []

    def runs(message: bytes, context: object) -> bytes:
        clock.now += 60
        outcomes.append(counting.arrive() is not None)
        clock.now += 60
        counting.engine.pending = 1
        outcomes.append(counting.arrive() is not None)
        counting.engine.pending = 2
        outcomes.append(counting.arrive() is not None)
        raise ValueError

    counting.handler = grpc.unary_unary_rpc_method_handler(runs)
    handler = counting.arrive()
    assert handler is not None
    with pytest.raises(ValueError):  # noqa: PT011 - the handler's own
        handler.unary_unary(b"", None)
    assert outcomes == [True, True, False]
    clock.now += 60
    counting.engine.pending = 0
    assert [counting.arrive() is not None for _ in range(3)] == [True, True, False]


def test_a_call_that_sends_nothing_loses_its_place(clock: Clock) -> None:
    """A call without a message occupies its place for a second only."""
    counting = Counting(clock, 1)
    slow = counting.arrive()
    assert counting.arrive() is None
    clock.now += overload.RECEIVE_SECONDS + 0.1
    assert counting.arrive() is not None
    assert slow is not None
    assert slow.unary_unary(b"late", None) == b"late"


def test_held_callers_are_let_go_once_there_are_places(clock: Clock) -> None:
    """Each call that ends while the queue is less than half full releases two delayed refusals."""
    counting = Counting(clock, 4)
    refusals, refused = counting.overload.refusals, Refused()
    refusals.start()
    for number in range(AT_ONCE + 5):
        refusals.submit(refused, number)
    refused.wait_for(AT_ONCE)
    handlers = [counting.arrive() for _ in range(3)]
    for ended, handler in enumerate(handlers):
        assert handler is not None
        handler.unary_unary(b"", None)
        if ended == 0:  # Two of four places are taken still.
            time.sleep(0.05)
            assert len(refused.done) == AT_ONCE
    assert sorted(refused.wait_for(AT_ONCE + 4)) == list(range(AT_ONCE + 4))
    time.sleep(0.05)
    assert len(refused.done) == AT_ONCE + 4
    refusals.shutdown()


class Busy:
    """A real server whose only place is taken by a forward pass that waits at a gate."""

    def __init__(self, gate_: Gate) -> None:
        self.gate = gate_
        self.engine = Engine(Limits(pending=1), plan_cache=kept())
        self.engine.load(ModelSpec("gatednets:gated", name="gated", item_shape=ITEM))
        self.metrics = Metrics(self.engine)
        self.server = FeatureServer(self.engine, ServerOptions(port=0), self.metrics)
        self.server.start()
        self.server.ready()
        self.pool = ThreadPoolExecutor(1)
        with Client(self.server.address) as client:
            self.right = client.extract("gated", batch(1), "conv")["conv"].copy()
        self.held = self.pool.submit(self.ask, batch(HELD_INPUT))
        self.gate.arrived()

    def ask(self, x: np.ndarray) -> np.ndarray:
        with Client(self.server.address, shared_memory=False) as client:
            return client.extract("gated", x, "conv", extractor="hook")["conv"].copy()

    def close(self) -> None:
        self.gate.open()
        self.held.result(30)
        self.pool.shutdown()
        self.server.stop(1)
        self.engine.close()


def batch(value: float) -> np.ndarray:
    return np.full((1, *ITEM), value, np.float32)


@pytest.fixture
def busy() -> Iterator[Busy]:
    with gate() as gate_:
        busy = Busy(gate_)
        yield busy
        busy.close()


@pytest.mark.parametrize("method", [EXTRACT, "/inference.GRPCInferenceService/ModelInfer"])
def test_a_call_is_refused_before_its_message_is_sent(busy: Busy, method: str) -> None:
    """A caller that has sent no byte of its message is refused, and told when to retry."""
    never = threading.Event()
    with grpc.insecure_channel(busy.server.address) as channel:
        # On the wire a unary call is a stream of one message; this one never sends it.
        call = channel.stream_unary(method)

        def messages() -> Iterator[bytes]:
            never.wait(30)
            yield from ()

        with pytest.raises(grpc.RpcError) as caught:
            call(messages(), timeout=20)
        never.set()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "queue full: 1 requests" in caught.value.details()
    trailing = dict(caught.value.trailing_metadata())
    assert 500 <= int(trailing["grpc-retry-pushback-ms"]) <= 1500
    assert trailing["layertap-error"] == "OverloadedError"
    assert trailing["x-request-id"]


def test_a_storm_of_refusals_is_slow_and_harms_nobody(busy: Busy) -> None:
    """Callers that retry at once are refused about once a second; health checks are answered."""
    ended: Counter[str] = Counter()
    ends = time.monotonic() + 2.5
    slowest = 0.0

    def caller() -> None:
        with Client(busy.server.address, shared_memory=False) as client:
            while time.monotonic() < ends:
                try:
                    client.extract("gated", batch(2), "conv")
                except OverloadedError as error:
                    ended["refused" if error.retry_after else "without a time"] += 1

    with ThreadPoolExecutor(32) as pool, Client(busy.server.address) as client:
        callers = [pool.submit(caller) for _ in range(32)]
        while time.monotonic() < ends:
            begun = time.monotonic()
            assert client.health() == "SERVING"
            slowest = max(slowest, time.monotonic() - begun)
        for each in callers:
            each.result(30)
    # Each caller about thrice, and what a second allows at once; unheld it would be thousands.
    assert set(ended) == {"refused"}
    assert 32 <= ended["refused"] <= 32 * 4 + AT_ONCE * 5
    assert slowest < 1.0
    counted = busy.metrics.registry.get_sample_value(
        "layertap_inference_request_failure_total", {"model": "", "reason": "RESOURCE_EXHAUSTED"}
    )
    assert counted == ended["refused"]
    busy.gate.open()
    busy.held.result(30)
    assert np.array_equal(busy.ask(batch(1)), busy.right)


def test_a_stop_does_not_wait_for_held_refusals(busy: Busy) -> None:
    """Calls with a delayed refusal end with a status as soon as the server stops."""
    codes: list[grpc.StatusCode] = []

    def caller() -> None:
        with grpc.insecure_channel(busy.server.address) as channel:
            try:
                channel.unary_unary(EXTRACT)(b"", timeout=30)
            except grpc.RpcError as error:
                codes.append(error.code())

    callers = [threading.Thread(target=caller) for _ in range(AT_ONCE + 12)]
    for each in callers:
        each.start()
    while len(codes) + len(busy.server._overload.refusals._held) < len(callers):
        time.sleep(0.01)
    begun = time.monotonic()
    busy.gate.open()
    busy.held.result(30)
    busy.server.stop(10)
    for each in callers:
        each.join()
    assert time.monotonic() - begun < 5
    assert len(codes) == AT_ONCE + 12
    assert set(codes) <= {
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
    }


def test_half_open_calls_keep_nobody_out(busy: Busy) -> None:
    """Calls whose message never arrives occupy the only place for a second, no longer."""
    busy.gate.open()
    busy.held.result(30)
    never = threading.Event()

    def messages() -> Iterator[bytes]:
        never.wait(60)
        yield from ()

    with grpc.insecure_channel(busy.server.address) as channel:
        halves = [channel.stream_unary(EXTRACT).future(messages(), timeout=60) for _ in range(4)]
        ends = time.monotonic() + 20
        while True:
            try:
                assert np.array_equal(busy.ask(batch(1)), busy.right)
                break
            except OverloadedError:
                assert time.monotonic() < ends
        for each in halves:
            each.cancel()
        never.set()
