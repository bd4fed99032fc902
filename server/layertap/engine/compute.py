"""The compute threads: the only threads that build, trace, warm and run models.

Note [One compute thread]
    OpenMP keeps a team of worker threads for every thread that enters it. Measured on 2 cores,
    resnet18 `avgpool`, p50: 26.2 ms on the only thread of a process that ever ran torch, 36.8 to
    44.7 ms on a second one, 39 to 45 ms in a pool of ten. So models run on one long-lived thread,
    and the threads that talk to callers wait for it.

    That is best for the latency of one request. For the throughput of many, one thread for each
    core, each computing alone (intra-op 1), needs no team at all and leaves no core idle between
    the parallel parts of an operation: docs/performance.md has both measured.
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
from layertap.extraction.gate import forward_passes

__all__ = ["ComputeThreads"]

T = TypeVar("T")


class ComputeThreads:
    """Runs jobs in the order in which they came, each on the first thread that is free.

    Args:
        max_pending: Jobs that may wait or run; one more is refused.
        instances: Threads.
        intra_op: Cores that one of them computes with; None leaves it to PyTorch.
    """

    def __init__(self, max_pending: int, instances: int = 1, intra_op: int | None = None) -> None:
        self.instances = instances

        def begin() -> None:
            if intra_op is not None:  # Here, as OpenMP keeps the number for each thread apart.
                torch.set_num_threads(intra_op)

        self._pool = ThreadPoolExecutor(
            max_workers=instances, thread_name_prefix="layertap-compute", initializer=begin
        )
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
            OverloadedError: Where too many jobs wait, and this is not the server's own.
            UnavailableError: After ``close``.
            DeadlineExceededError, CancelledError: Where the caller is not waiting any more.
        """
        self._admit(call)

        def guarded() -> T:
            call.check()
            with forward_passes(), torch.inference_mode():
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
        """Finish what was admitted, refuse anything new, end the threads."""
        self._pool.shutdown(wait=True)

    def _admit(self, call: Call) -> None:
        with self._lock:
            if self._pending >= self._max_pending and not call.own:
                raise OverloadedError(
                    f"queue full: {self._max_pending} requests are waiting, the most allowed"
                )
            self._pending += 1

    def _leave(self) -> None:
        with self._lock:
            self._pending -= 1
