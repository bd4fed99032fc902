"""A call knows when no caller waits for it any more."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import Future
from functools import partial
from threading import Event

import pytest

from layertap.call import Call, result_in_time
from layertap.errors import CancelledError, DeadlineExceededError


@pytest.mark.parametrize("timeout", [None, threading.TIMEOUT_MAX * 2, 1e18])
def test_a_call_without_a_deadline_never_expires(timeout) -> None:
    """Without a deadline, and with gRPC's value for none, the caller waits forever."""
    call = Call(timeout)
    assert call.remaining() is None
    call.check()


@pytest.mark.parametrize("timeout", [0, -1.0])
def test_a_passed_deadline_is_an_error(timeout) -> None:
    """Work whose deadline has passed must not begin."""
    with pytest.raises(DeadlineExceededError):
        Call(timeout).check()


def test_cancelling_runs_each_action_once() -> None:
    """Actions run when the caller leaves, and at once if it has left already."""
    call, ran = Call(), []
    with call.cancelling(lambda: ran.append("before")):
        call.cancel()
        call.cancel()
    with call.cancelling(lambda: ran.append("after")):
        pass
    assert ran == ["before", "after"]
    with pytest.raises(CancelledError):
        call.check()


def test_a_call_keeps_nothing_of_a_block_that_has_ended() -> None:
    """Its action does not run any more, and the call does not keep it alive."""
    call, ran = Call(), []
    needed = Event()
    alive = weakref.ref(needed)
    with call.cancelling(partial(ran.append, needed)):
        pass
    del needed
    assert alive() is None
    call.cancel()
    assert ran == []


def test_the_earlier_deadline_counts() -> None:
    """A request's own timeout can shorten the deadline but never extend it."""
    call = Call(3600.0)
    call.limit(1e18)
    assert 3500 < call.remaining() <= 3600
    call.limit(7200.0)
    assert 3500 < call.remaining() <= 3600
    call.limit(60.0)
    assert 50 < call.remaining() <= 60
    endless = Call()
    endless.limit(60.0)
    assert 50 < endless.remaining() <= 60


class FailsAtTheDeadline(Future[None]):
    """Has no result in time, and an error when its caller has noticed that."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def result(self, timeout: float | None = None) -> None:
        """See Future."""
        try:
            super().result(timeout)
        except TimeoutError:
            self.set_exception(self._error)
            raise


@pytest.mark.parametrize("error", [KeyError("x"), TimeoutError("x"), DeadlineExceededError("x")])
def test_a_failure_after_the_deadline_is_a_deadline(error: Exception) -> None:
    """The caller gets the error of the deadline, not the one by which Python ends a wait."""
    with pytest.raises(DeadlineExceededError, match="too late"):
        result_in_time(FailsAtTheDeadline(error), Call(timeout=0), "too late")


@pytest.mark.parametrize("error", [KeyError("x"), TimeoutError("x"), FutureCancelledError("x")])
def test_a_failure_in_time_is_passed_on(error: Exception) -> None:
    """Even if it has the type of an error of the wait, and even at the deadline."""
    future: Future[None] = Future()
    future.set_exception(error)
    for timeout in (0, 30):
        with pytest.raises(type(error), match="x"):
            result_in_time(future, Call(timeout=timeout), "too late")


def test_a_future_that_was_cancelled_has_no_caller() -> None:
    """Whatever the deadline."""
    future: Future[None] = Future()
    future.cancel()
    with pytest.raises(CancelledError, match="cancelled the call or disconnected"):
        result_in_time(future, Call(timeout=0), "too late")


def test_a_result_in_time() -> None:
    """It is returned."""
    future: Future[int] = Future()
    future.set_result(3)
    assert result_in_time(future, Call(timeout=0), "too late") == 3
