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
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from layertap.batching import ALONE, BatchPolicy, BatchQueue, ClosedError
from layertap.engine.admission import Reservation
from layertap.engine.call import Call
from layertap.engine.intra_op import intra_op_cores, set_intra_op, start_team
from layertap.errors import (
    CancelledError,
    DeadlineExceededError,
    LayertapError,
    UnavailableError,
)
from layertap.extraction.gate import forward_passes
from layertap.threads import require_threads

__all__ = ["ComputeThreads"]

T = TypeVar("T")
R = TypeVar("R")

Runner = Callable[[Sequence[T]], Sequence[R]]
"""Computes a batch of items together: as many results, in their order."""


class _Job(Generic[T, R]):
    """An item, how it is computed, and who waits for the result."""

    def __init__(self, item: T, runner: Runner[T, R], call: Call) -> None:
        self.item = item
        self.runner = runner
        self.future: Future[R] = Future()
        # What is logged while it runs tells its caller's request.
        self.context = copy_context()
        self._call = call

    def pin(self, reservations: Sequence[Reservation]) -> None:
        """Keep reservations until the job is done or was abandoned."""
        for reservation in reservations:
            reservation.pin()
        self.future.add_done_callback(partial(_unpin, reservations))

    def begin(self) -> bool:
        """Return whether somebody still waits for it."""
        if not self.future.set_running_or_notify_cancel():
            return False
        try:
            self._call.check()
        except LayertapError as error:
            # Without its traceback, which refers to this job, which refers to the error.
            self.future.set_exception(error.with_traceback(None))
            return False
        return True


def _unpin(reservations: Sequence[Reservation], done: Future[Any]) -> None:
    for reservation in reservations:
        reservation.unpin()


class ComputeThreads:
    """Runs jobs in the order in which they came, each on the first thread that is free.

    Args:
        instances: Threads.
        intra_op: Cores that one of them computes with; None leaves it to PyTorch, which takes
            those of the machine, but no more than the process may use.

    Raises:
        UnavailableError: If the system does not allow that many threads.
    """

    def __init__(self, instances: int = 1, intra_op: int | None = None) -> None:
        self.instances = instances
        self._intra_op = intra_op
        self._queue: BatchQueue[_Job[Any, Any]] = BatchQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"layertap-compute-{index}")
            for index in range(instances)
        ]
        # With those of the OpenMP teams, whose library ends the process where it can't start one.
        require_threads(instances * intra_op_cores(intra_op))
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether all of the threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def run(self, job: Callable[[], R], call: Call, pins: Sequence[Reservation] = ()) -> R:
        """Run a job under ``torch.inference_mode`` and return what it returns.

        A job whose caller went away or whose deadline passed before its turn is not run.

        Args:
            job: What to run.
            call: The deadline and cancellation state of its request.
            pins: See ``run_batched``.

        Raises:
            UnavailableError: After ``close``.
            DeadlineExceededError, CancelledError: If the caller is not waiting any more.
        """
        return self.run_batched(None, lambda _: [job()], call, pins=pins)

    def run_batched(
        self,
        item: T,
        runner: Runner[T, R],
        call: Call,
        *,
        key: Hashable = None,
        size: int = 1,
        policy: BatchPolicy = ALONE,
        pins: Sequence[Reservation] = (),
    ) -> R:
        """Run an item as ``run`` does a job, together with others of its key that wait as well.

        If a batch of several items fails, each item is run alone, so that one caller's input does
        not affect another's request.

        Args:
            item: The item to compute.
            runner: Computes items of one key; that of the oldest is called.
            call: The deadline and cancellation state of its request.
            key: Items with the same key may share a batch; None to run the item alone.
            size: What the item adds to a batch.
            policy: How large a batch may get and how long it is waited for.
            pins: Bytes that the job uses; they stay reserved until it is done, even if its caller
                disconnects earlier.
        """
        job = _Job(item, runner, call)
        try:
            job.pin(pins)
            self._put(job, key, size, policy)
            with call.cancelling(partial(self._forget, job)):
                return job.future.result(timeout=call.remaining())
        except FutureCancelledError:
            raise CancelledError("the caller went away") from None
        except TimeoutError:
            if job.future.done() and not job.future.cancelled():
                raise
            self._forget(job)
            raise DeadlineExceededError("the deadline passed before the answer was ready") from None
        finally:
            # An error that the job raised refers to this frame: it must not refer to the job, which
            # refers to the error.
            del job

    def close(self) -> None:
        """Finish what was admitted, refuse anything new, end the threads."""
        self._queue.close()
        for thread in self._threads:
            thread.join()

    def _put(self, job: _Job[Any, Any], key: Hashable, size: int, policy: BatchPolicy) -> None:
        try:
            self._queue.put(job, key, size, policy)
        except ClosedError:
            job.future.cancel()
            raise UnavailableError("the server is shutting down") from None

    def _forget(self, job: _Job[Any, Any]) -> None:
        """Remove a job that nobody waits for from the queue; a running job continues."""
        if job.future.cancel():
            self._queue.discard(job)

    def _work(self) -> None:
        set_intra_op(self._intra_op)
        start_team()
        while jobs := self._queue.take():
            wanted = [job for job in jobs if job.begin()]
            if wanted:
                with forward_passes(), torch.inference_mode():
                    _settle(wanted)
            # Or the last batch's tensors would live until the next one comes.
            del jobs, wanted


def _settle(jobs: Sequence[_Job[Any, Any]]) -> None:
    """Run jobs of one key together, each alone where that fails."""
    try:
        results = jobs[0].context.run(jobs[0].runner, [job.item for job in jobs])
    except BaseException as error:  # noqa: BLE001 - it is the callers', whatever it is
        if len(jobs) == 1:
            jobs[0].future.set_exception(error)
            # The error refers to this frame, and through it to the job and to itself.
            del jobs
            return
    else:
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)
        return
    for job in jobs:
        _settle([job])
