"""Work beside the compute threads, for what may take long and must not hold requests up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TypeVar

import torch

from layertap.engine.call import Call
from layertap.engine.intra_op import intra_op_cores, set_intra_op
from layertap.errors import CancelledError
from layertap.threads import require_threads, start_thread

__all__ = ["run_beside"]

T = TypeVar("T")


def run_beside(job: Callable[[], T], call: Call) -> T:
    """Run a job under ``torch.inference_mode`` in a thread of its own, and return what it returns.

    For building modules and reading weights while requests are served. What runs models belongs on
    a compute thread (Note [One compute thread]); the OpenMP team that a job may start here ends
    with its thread. No ``forward_passes`` is held, as symbolic tracing, and all requests behind
    it, would wait for the job's end.

    Raises:
        CancelledError: Where the call was cancelled; the job is left to itself, and its result to
            the garbage.
        UnavailableError: Where the system does not allow the threads that this takes.
    """
    done: Future[T] = Future()

    def work() -> None:
        try:
            set_intra_op(None)
            with torch.inference_mode():
                result = job()
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            with suppress(InvalidStateError):
                done.set_exception(error)
        else:
            with suppress(InvalidStateError):
                done.set_result(result)

    # With those of the OpenMP team, whose library ends the process where it can't start one.
    require_threads(intra_op_cores(None))
    # A daemon: what hangs must not keep the process from ending.
    start_thread(threading.Thread(target=work, name="layertap-loader", daemon=True))
    try:
        with call.cancelling(done.cancel):
            return done.result()
    except FutureCancelledError:
        raise CancelledError("the load was given up") from None
