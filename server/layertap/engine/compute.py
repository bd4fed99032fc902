"""The compute thread: the one thread that builds, traces, warms and runs models.

Note [One compute thread]
    OpenMP keeps a team of worker threads for every thread that enters it. Measured on 2 cores,
    resnet18 `avgpool`, p50: 26.2 ms on the only thread of a process that ever ran torch, 36.8 to
    44.7 ms on a second one, 39 to 45 ms in a pool of ten. So models run on one long-lived thread,
    and the threads that talk to callers wait for it. It also keeps symbolic tracing, which patches
    ``Module.__call__`` process-wide, apart from every forward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from layertap.engine.call import Call
from layertap.errors import (
    CancelledError,
    DeadlineExceededError,
    OverloadedError,
    UnavailableError,
)

__all__ = ["ComputeThread"]

T = TypeVar("T")


class ComputeThread:
    """Runs jobs one after the other, in the order in which they came.

    Args:
        max_pending: Jobs that may wait or run; one more is refused.
    """

    def __init__(self, max_pending: int) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="layertap-compute")
        self._max_pending = max_pending
        self._pending = 0
        self._lock = threading.Lock()

    @property
    def pending(self) -> int:
        """Jobs that wait or run."""
        return self._pending

    def run(self, job: Callable[[], T], call: Call) -> T:
        """Run a job under ``torch.inference_mode`` and return what it returns.

        A job whose caller went away or whose deadline passed before its turn is not run.

        Raises:
            OverloadedError: Where too many jobs wait.
            UnavailableError: After ``close``.
            DeadlineExceededError, CancelledError: Where the caller is not waiting any more.
        """
        self._admit()

        def guarded() -> T:
            call.check()
            with torch.inference_mode():
                return job()

        try:
            future = self._pool.submit(guarded)
        except RuntimeError:
            self._leave()
            raise UnavailableError("the server is shutting down") from None
        future.add_done_callback(lambda _: self._leave())
        call.on_cancel(future.cancel)
        try:
            return future.result(timeout=call.remaining())
        except FutureCancelledError:
            raise CancelledError("the caller went away") from None
        except TimeoutError:
            if future.done() and not future.cancelled():
                raise
            future.cancel()
            raise DeadlineExceededError("the deadline passed before the answer was ready") from None

    def close(self) -> None:
        """Finish what was admitted, refuse anything new, end the thread."""
        self._pool.shutdown(wait=True)

    def _admit(self) -> None:
        with self._lock:
            if self._pending >= self._max_pending:
                raise OverloadedError(
                    f"queue full: {self._max_pending} requests are waiting, the most allowed"
                )
            self._pending += 1

    def _leave(self) -> None:
        with self._lock:
            self._pending -= 1
