"""A model is loaded in a thread of its own, and its caller may leave meanwhile."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError as FutureCancelledError

import pytest
import torch

from layertap.call import Call
from layertap.engine.loader_thread import run_in_loader_thread
from layertap.errors import CancelledError


def test_a_job_has_a_thread_of_its_own() -> None:
    """Its result is returned; it runs in inference mode."""
    thread, mode = run_in_loader_thread(
        lambda: (threading.get_ident(), torch.is_inference_mode_enabled()), Call()
    )
    assert thread != threading.get_ident()
    assert mode


@pytest.mark.parametrize("error", [KeyError("x"), FutureCancelledError("x")])
def test_what_a_job_raises_reaches_its_caller(error: Exception) -> None:
    """Even if it has the type of the error by which Python tells that a wait was cancelled."""

    def fail() -> None:
        raise error

    with pytest.raises(type(error), match="x"):
        run_in_loader_thread(fail, Call())


def test_a_caller_may_leave() -> None:
    """It does not wait for the job, which goes on."""
    call, begun, go, ended = Call(), *(threading.Event() for _ in range(3))

    def job() -> None:
        begun.set()
        assert go.wait(60)
        ended.set()

    threading.Thread(target=lambda: (begun.wait(60), call.cancel())).start()
    with pytest.raises(CancelledError, match="the load was cancelled"):
        run_in_loader_thread(job, call)
    assert not ended.is_set()
    go.set()
    assert ended.wait(60)
