"""Requests wait for plans that take long to build, and what they wait for is built once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from layertap.call import Call
from layertap.engine.slow_plans import SlowPlans
from layertap.errors import (
    CancelledError,
    DeadlineExceededError,
    ExtractorUnsupportedError,
    UnavailableError,
)

PATIENCE = 30.0


class Building:
    """Steps that go on until they are told to end; notes what is built."""

    def __init__(self, error: Exception | None = None) -> None:
        self.built: list[tuple[str, Any]] = []
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self._error = error

    def steps(self, key: str, example: Any) -> Iterator[None]:
        self.begun.set()
        while not self.may_end.wait(0.005):
            yield
        if self._error is not None:
            raise self._error
        self.built.append((key, example))


class Waiting(Call):
    """A call that tells when it waits for a building."""

    def __init__(self, timeout: float) -> None:
        super().__init__(timeout)
        self.begun = threading.Event()

    def cancelling(self, action: Callable[[], object]) -> Any:
        self.begun.set()
        return super().cancelling(action)


def test_requests_for_one_plan_wait_for_one_building() -> None:
    """Four callers, one building, with the example of the first."""
    building = Building()
    calls = [Waiting(PATIENCE) for _ in range(4)]
    with closing(SlowPlans(building.steps)) as plans, ThreadPoolExecutor(4) as pool:
        waits = [pool.submit(plans.wait_for, "a", 1, call) for call in calls]
        assert building.begun.wait(PATIENCE)
        assert all(call.begun.wait(PATIENCE) for call in calls)
        assert not any(wait.done() for wait in waits)
        building.may_end.set()
        assert [wait.result(PATIENCE) for wait in waits] == [None] * 4
    assert building.built == [("a", 1)]


def test_a_deadline_ends_the_waiting_and_not_the_building() -> None:
    """The next request finds what the first one began."""
    building = Building()
    with closing(SlowPlans(building.steps)) as plans:
        with pytest.raises(DeadlineExceededError, match="which goes on"):
            plans.wait_for("a", 1, Call(0.05))
        building.may_end.set()
        plans.wait_for("b", 2, Call(PATIENCE))
    assert building.built == [("a", 1), ("b", 2)]


def test_a_caller_that_leaves_ends_its_waiting_only() -> None:
    """Another caller for the same plan still gets it."""
    building = Building()
    with closing(SlowPlans(building.steps)) as plans, ThreadPoolExecutor(2) as pool:
        leaving = Call(PATIENCE)
        left = pool.submit(plans.wait_for, "a", 1, leaving)
        stays = pool.submit(plans.wait_for, "a", 1, Call(PATIENCE))
        assert building.begun.wait(PATIENCE)
        leaving.cancel()
        with pytest.raises(CancelledError):
            left.result(PATIENCE)
        building.may_end.set()
        assert stays.result(PATIENCE) is None


def test_the_error_of_a_building_is_that_of_its_requests() -> None:
    """They get its class and text, and the next request starts a new building."""
    building = Building(ExtractorUnsupportedError("it branches"))
    building.may_end.set()
    with closing(SlowPlans(building.steps)) as plans:
        for _ in range(2):
            with pytest.raises(ExtractorUnsupportedError, match="it branches"):
                plans.wait_for("a", 1, Call(PATIENCE))


def test_closing_gives_up_what_is_built_and_what_waits() -> None:
    """Both requests are told that the server ends; later ones too."""
    building = Building()
    plans = SlowPlans(building.steps)
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(plans.wait_for, key, 1, Call(PATIENCE)) for key in "ab"]
        assert building.begun.wait(PATIENCE)
        plans.close()
        for wait in waits:
            with pytest.raises(UnavailableError):
                wait.result(PATIENCE)
    with pytest.raises(UnavailableError):
        plans.wait_for("c", 1, Call(PATIENCE))
    assert building.built == []
