"""The compute threads: the only threads that build, trace, warm and run models.

Note [One compute thread]
    OpenMP keeps a team of worker threads for every thread that uses it. On 2 cores, the median
    time of resnet18 `avgpool` was 26.2 ms if only one thread of the process ever ran torch, 36.8 to
    44.7 ms on a second such thread, and 39 to 45 ms in a pool of ten. So models run on one
    long-lived thread, and the threads that communicate with callers wait for it.

    That is best for the latency of one request. For the throughput of many requests it is better to
    have one thread per core, each with a single core (intra-op 1). Then no teams are needed, and no
    core is idle between the parallel parts of an operation. docs/performance.md has measurements
    of both.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch

from layertap.batching import ALONE, BatchPolicy, BatchQueue, ClosedError
from layertap.call import Call, result_in_time
from layertap.engine.admission import Reservation
from layertap.engine.intra_op import intra_op_cores, set_intra_op, start_team
from layertap.engine.lost_device import loss_of
from layertap.errors import LayertapError, UnavailableError
from layertap.extraction.gate import forward_passes
from layertap.threads import require_threads

__all__ = ["ComputeThreads", "Part"]

_log = logging.getLogger(__name__)

_LATE = "the deadline passed before the answer was ready"

T = TypeVar("T")
R = TypeVar("R")

Runner = Callable[[Sequence[T]], Sequence[R]]
"""Computes a batch of items; returns one result per item, in the same order."""


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """A part of a request.

    Attributes:
        item: What is computed.
        size: How many items it adds to a batch.
        length: Their length, if items of other lengths have the same key; else 0.
    """

    item: T
    size: int = 1
    length: int = 0


class _Job(Generic[T, R]):
    """An item, the function that computes it, and the future on which the caller waits."""

    def __init__(self, item: T, runner: Runner[T, R], call: Call) -> None:
        self.item = item
        self.runner = runner
        self.future: Future[R] = Future()
        # Log records of the job then have the id of its caller's request.
        self.context = copy_context()
        self._call = call

    def pin(self, reservations: Sequence[Reservation]) -> None:
        """Keep reservations until the job is done or abandoned."""
        for reservation in reservations:
            reservation.pin()
        self.future.add_done_callback(partial(_unpin, reservations))

    def begin(self) -> bool:
        """Mark the job as running; return False if no caller waits for it any more."""
        if not self.future.set_running_or_notify_cancel():
            return False
        try:
            self._call.check()
        except LayertapError as error:
            # Without the traceback, which refers to this job, which in turn refers to the error.
            self.future.set_exception(error.with_traceback(None))
            return False
        return True


def _unpin(reservations: Sequence[Reservation], done: Future[Any]) -> None:
    for reservation in reservations:
        reservation.unpin()


_running: WeakSet[ComputeThreads] = WeakSet()


@atexit.register
def _close_all() -> None:
    """End the threads of a program that ends without closing its engine or model.

    They are daemon threads, for which Python does not wait: it would wait for ever.
    """
    for threads in list(_running):
        threads.close()


class ComputeThreads:
    """Runs jobs in order of arrival, each on the first free thread.

    Args:
        instances: The number of threads.
        intra_op: Cores that each thread computes with. None leaves this to PyTorch, which uses all
            cores of the machine, but no more than the process may use.
        device: The device that the jobs use. Once it is lost (see ``lost_device``), every job is
            refused.

    Raises:
        UnavailableError: If the system does not allow this many threads.
    """

    def __init__(
        self,
        instances: int = 1,
        intra_op: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.instances = instances
        self._intra_op = intra_op
        self._device = device or torch.device("cpu")
        self._lost = ""
        self._queue: BatchQueue[_Job[Any, Any]] = BatchQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"layertap-compute-{index}", daemon=True)
            for index in range(instances)
        ]
        # Counts the OpenMP teams too: OpenMP's library ends the process if it can't start a thread.
        require_threads(instances * intra_op_cores(intra_op))
        for thread in self._threads:
            thread.start()
        _running.add(self)

    @property
    def alive(self) -> bool:
        """Whether all of the threads run, and their device works."""
        return not self._lost and all(thread.is_alive() for thread in self._threads)

    def run(self, job: Callable[[], R], call: Call, pins: Sequence[Reservation] = ()) -> R:
        """Run a job under ``torch.inference_mode`` and return its result.

        The job is not run if its caller leaves or its deadline passes before its turn.

        Args:
            job: The job.
            call: The deadline and cancellation state of its request.
            pins: See ``run_batched``.

        Raises:
            UnavailableError: After ``close``.
            DeadlineExceededError, CancelledError: If the caller no longer waits.
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
        """Run an item like a job in ``run``, in a batch with waiting items that have its key.

        If a batch of several items fails, each item is run alone, so that one caller's input does
        not affect another's request.

        Args:
            item: The item to compute.
            runner: Computes items of one key. For a batch, the oldest item's runner is called.
            call: The deadline and cancellation state of its request.
            key: Items with the same key may share a batch; None to run the item alone.
            size: What the item adds to a batch.
            policy: How large a batch may get, and how long it may wait for more items.
            pins: Bytes that the job uses. They stay reserved until it is done, even if its caller
                disconnects earlier.
        """
        (result,) = self.run_each(
            [Part(item, size)], runner, call, key=key, policy=policy, pins=pins
        )
        return result

    def run_each(
        self,
        parts: Sequence[Part[T]],
        runner: Runner[T, R],
        call: Call,
        *,
        key: Hashable = None,
        policy: BatchPolicy = ALONE,
        pins: Sequence[Reservation] = (),
    ) -> list[R]:
        """Run the parts of one request, each as ``run_batched`` does, and return their results.

        They run on all free threads. If one fails, those that don't run yet are dropped.
        """
        jobs = [_Job(part.item, runner, call) for part in parts]
        try:
            for job, part in zip(jobs, parts, strict=True):
                job.pin(pins)
                self._put(job, key, part, policy)
            results = []
            with call.cancelling(partial(self._forget_all, jobs)):
                # Not a comprehension: an error would refer to its frame, which nothing clears.
                for job in jobs:
                    results.append(result_in_time(job.future, call, _LATE))  # noqa: PERF401
            return results
        finally:
            self._forget_all(jobs)
            # An error of a job refers to this frame, and the job refers to the error. Deleting
            # these names breaks this cycle.
            del jobs
            job = part = None  # type: ignore[assignment]

    def close(self) -> None:
        """Finish the admitted jobs, refuse new ones, and end the threads."""
        self._queue.close()
        for thread in self._threads:
            thread.join()
        _running.discard(self)

    def _put(
        self, job: _Job[Any, Any], key: Hashable, part: Part[Any], policy: BatchPolicy
    ) -> None:
        if self._lost:
            job.future.cancel()
            raise UnavailableError(self._lost)
        try:
            self._queue.put(job, key, part.size, policy, length=part.length)
        except ClosedError:
            job.future.cancel()
            raise UnavailableError("the server is shutting down") from None

    def _forget(self, job: _Job[Any, Any]) -> None:
        """Remove a job that no caller waits for from the queue; a running job continues."""
        if job.future.cancel():
            self._queue.discard(job)

    def _forget_all(self, jobs: Sequence[_Job[Any, Any]]) -> None:
        for job in jobs:
            self._forget(job)

    def _work(self) -> None:
        set_intra_op(self._intra_op)
        start_team()
        while jobs := self._queue.take():
            wanted = [job for job in jobs if job.begin()]
            if wanted:
                self._run_all(wanted)
            # Otherwise the last batch's tensors would live until the next batch comes.
            del jobs, wanted

    def _run_all(self, jobs: Sequence[_Job[Any, Any]]) -> None:
        if self._lost:  # They were admitted before it was.
            for job in jobs:
                job.future.set_exception(UnavailableError(self._lost))
            return
        with forward_passes(), torch.inference_mode():
            _settle(jobs)
        if self._device.type == "cuda":
            self._look_after_device(job.future.exception() for job in jobs)

    def _look_after_device(self, errors: Iterable[BaseException | None]) -> None:
        for error in errors:
            if error is not None and not self._lost:
                self._lost = loss_of(self._device, error)
                if self._lost:
                    _log.critical("%s", self._lost)


def _settle(jobs: Sequence[_Job[Any, Any]]) -> None:
    """Run jobs of one key together, or one by one if that fails."""
    try:
        results = jobs[0].context.run(jobs[0].runner, [job.item for job in jobs])
    except BaseException as error:  # noqa: BLE001 - any exception is passed on to the caller
        if len(jobs) == 1:
            jobs[0].future.set_exception(error)
            # Break the cycle from the error through this frame to the job and the error.
            del jobs
            return
    else:
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)
        return
    for job in jobs:
        _settle([job])
