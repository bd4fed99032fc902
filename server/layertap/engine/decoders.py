"""Decodes inputs, as many at once as there are CPUs.

Note [Who decodes]
    A request decodes its inputs in its own thread, as a thread of its own would cost a handover,
    which a lone image would notice. Further images of the request are decoded by helpers if CPUs
    are idle: no request waits for a helper, and a server under load decodes as without them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from layertap.call import Call
from layertap.errors import DeadlineExceededError
from layertap.threads import WorkerThreads

__all__ = ["Decoders"]

MOST_HELPERS = 15
"""Helpers at most: a request seldom has more images than this, and each thread takes memory."""


class Decoders:
    """Permits to decode, one for each CPU, and threads that help with large requests.

    Args:
        cpus: The number of inputs that may be decoded at once.
    """

    def __init__(self, cpus: int) -> None:
        self._permits = threading.Semaphore(cpus)
        self._most = min(cpus - 1, MOST_HELPERS)
        # A pool has at least one thread, which with one CPU is never started.
        self._helpers = WorkerThreads(max(self._most, 1), "layertap-decode")
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def permit(self, call: Call) -> Iterator[None]:
        """Wait until fewer inputs are being decoded than there are CPUs; more would be slower.

        Raises:
            DeadlineExceededError: The call's deadline passed before.
        """
        if not self._permits.acquire(timeout=call.remaining()):
            raise DeadlineExceededError("the deadline passed before the input was decoded")
        try:
            yield
        finally:
            self._permits.release()

    def each(self, task: Callable[[int], object], count: int, call: Call) -> None:
        """Run ``task`` for 0 up to ``count``, in this thread and in those that are idle.

        Returns once none of them runs any more. After an error no further one begins.

        Raises:
            DeadlineExceededError: The call's deadline passed.
            CancelledError: The caller left.
            Exception: The error of the first task that failed, in their order.
        """
        tasks = _Tasks(task, count, call)
        with self.permit(call):
            helping = self._help(tasks, count - 1)
            tasks.work()
            for helper in helping:
                helper.result()
        tasks.raise_error()

    def close(self) -> None:
        """End the helpers; requests that are still being decoded go on without them."""
        with self._lock:
            self._closed = True
            self._helpers.shutdown(wait=False)

    def _help(self, tasks: _Tasks, count: int) -> list[Future[None]]:
        """Let up to ``count`` helpers work on tasks, as many as there are CPUs without work."""
        helping: list[Future[None]] = []
        with self._lock:
            if self._closed:
                return helping
            self._start(min(count, self._most))
            while len(helping) < count and self._permits.acquire(blocking=False):
                helper = self._helpers.submit_if_free(lambda: self._work(tasks))
                if helper is None:
                    self._permits.release()
                    break
                helping.append(helper)
        return helping

    def _work(self, tasks: _Tasks) -> None:
        try:
            tasks.work()
        finally:
            self._permits.release()

    def _start(self, count: int) -> None:
        """Start helpers when they are first needed; without them the request works alone."""
        while self._helpers.count < count and self._helpers.start_one():
            pass


class _Tasks:
    """Tasks that several threads take from, in order."""

    def __init__(self, task: Callable[[int], object], count: int, call: Call) -> None:
        self._task = task
        self._count = count
        self._call = call
        self._lock = threading.Lock()
        self._next = 0
        self._errors: dict[int, Exception] = {}

    def work(self) -> None:
        """Run tasks until none is left or one has failed."""
        while (index := self._take()) is not None:
            try:
                self._call.check()
                self._task(index)
            except Exception as error:  # noqa: BLE001 - raise_error raises it again
                with self._lock:
                    self._errors[index] = error

    def raise_error(self) -> None:
        """Raise the error of the first failed task. Earlier ones have been taken, so have ended."""
        if self._errors:
            errors, self._errors = self._errors, {}
            raise errors[min(errors)]

    def _take(self) -> int | None:
        with self._lock:
            if self._errors or self._next == self._count:
                return None
            self._next += 1
            return self._next - 1
