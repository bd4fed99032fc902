"""A call knows when nobody waits for it any more."""

from __future__ import annotations

import threading

import pytest

from layertap.engine.call import Call
from layertap.errors import CancelledError, DeadlineExceededError


@pytest.mark.parametrize("timeout", [None, threading.TIMEOUT_MAX * 2, 1e18])
def test_a_call_without_a_deadline_never_expires(timeout) -> None:
    """No deadline, and what gRPC reports for none, mean that the caller waits for ever."""
    call = Call(timeout)
    assert call.remaining() is None
    call.check()


@pytest.mark.parametrize("timeout", [0, -1.0])
def test_a_passed_deadline_is_an_error(timeout) -> None:
    """Work whose deadline has passed is not to be begun."""
    with pytest.raises(DeadlineExceededError):
        Call(timeout).check()


def test_cancelling_runs_each_action_once() -> None:
    """Actions run when the caller goes away, and at once when it has gone already."""
    call, ran = Call(), []
    call.on_cancel(lambda: ran.append("before"))
    call.cancel()
    call.cancel()
    call.on_cancel(lambda: ran.append("after"))
    assert ran == ["before", "after"]
    with pytest.raises(CancelledError):
        call.check()
