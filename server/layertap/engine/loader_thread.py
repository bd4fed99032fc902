"""Loads a model in its own thread, so that the compute threads keep serving requests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TypeVar

import torch

from layertap.call import Call
from layertap.engine.intra_op import intra_op_cores, set_intra_op
from layertap.errors import CancelledError
from layertap.threads import require_threads, start_thread

__all__ = ["run_in_loader_thread"]

T = TypeVar("T")


def run_in_loader_thread(job: Callable[[], T], call: Call) -> T:
    """Run a job under ``torch.inference_mode`` in its own thread, and return its result.

    This is for building modules and reading weights while requests are served. Code that runs
    models belongs on a compute thread (Note [One compute thread]). If the job starts an OpenMP
    team here, the team ends with this thread. ``forward_passes`` is not held, as symbolic tracing,
    and then all requests, would wait for the end of the job.

    Raises:
        CancelledError: If the call was cancelled; the job continues and its result is dropped.
        UnavailableError: If the system does not allow enough threads.
    """
    done: Future[T] = Future()

    def work() -> None:
        try:
            set_intra_op(None)
            with torch.inference_mode():
                result = job()
        except BaseException as error:  # noqa: BLE001 - ``done.result()`` raises it again
            with suppress(InvalidStateError):
                done.set_exception(error)
        else:
            with suppress(InvalidStateError):
                done.set_result(result)

    # This counts the OpenMP team too: OpenMP's library ends the process if it can't start a thread.
    require_threads(intra_op_cores(None))
    # A daemon thread, as a job that hangs must not keep the process from ending.
    start_thread(threading.Thread(target=work, name="layertap-loader", daemon=True))
    try:
        with call.cancelling(done.cancel):
            return done.result()
    except FutureCancelledError:
        if not done.cancelled():
            raise  # It is the job's own.
        raise CancelledError("the load was cancelled") from None
