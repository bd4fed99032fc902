"""Thread pools whose threads all exist before they are needed.

Note [Threads that can't be started]
    Containers limit how many threads a process may have (the pids control group, RLIMIT_NPROC), and
    memory limits it too. ``concurrent.futures.ThreadPoolExecutor`` starts a thread when it gets a
    task, in the thread that submits the task. In gRPC that is the thread that reads every call. If
    it raises "can't start new thread" there, the server never answers anything again. So the pools
    here start all threads before the server is ready, and none later. If the system allows fewer
    than wanted, each pool gets its share. Then some threads are ended again, to leave room for
    threads that are needed later: to reload a model, or for an OpenMP team (whose library ends the
    process if it can't start one).
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

from layertap.errors import UnavailableError

__all__ = [
    "RESERVE",
    "THREADS_REFUSED",
    "CallersThread",
    "WorkerThreads",
    "is_thread_refused",
    "require_threads",
    "run_in",
    "start_thread",
    "start_threads",
]

P = ParamSpec("P")
R = TypeVar("R")

RESERVE = 32
"""Threads to leave to the rest of the process if the system allows fewer than wanted."""

LEAST = 2
"""Minimum number of threads per pool; with fewer, a server doesn't start."""

THREADS_REFUSED = (
    "the system allows this process no more threads: raise its limit of processes (pids.max of the "
    "control group, docker --pids-limit, ulimit -u)"
)


def is_thread_refused(error: Exception) -> bool:
    """Return whether an error means that the system did not allow another thread."""
    # Python has no exception class for this.
    return isinstance(error, RuntimeError) and "can't start new thread" in str(error)


# A task, or None to end the thread that takes it.
_Task = Callable[[], None] | None


class WorkerThreads(ThreadPoolExecutor):
    """A pool that never starts a thread by itself; ``start_threads`` starts them.

    A task waits until a thread is free. The threads are daemons, so a task that hangs does not keep
    the process from ending.

    It is a ThreadPoolExecutor because gRPC accepts nothing else as a handler's own threads (see
    ``run_in``); it has only the methods in common with it.

    Args:
        most: The number of threads that it should have.
        name: The prefix of the threads' names; a number follows.

    Attributes:
        most: The number of threads that it should have.
        name: The prefix of the threads' names.
    """

    def __init__(self, most: int, name: str) -> None:
        super().__init__(most, thread_name_prefix=name)
        self.most = most
        self.name = name
        self._tasks: SimpleQueue[_Task] = SimpleQueue()
        self._lock = threading.Lock()
        self._alive: set[threading.Thread] = set()
        self._count = 0
        self._unfinished = 0
        self._closed = False

    @property
    def count(self) -> int:
        """The number of threads."""
        return self._count

    @property
    def busy(self) -> int:
        """The number of tasks that have not ended yet, including waiting ones."""
        return self._unfinished

    @property
    def waiting(self) -> int:
        """The number of tasks that wait for a thread."""
        return self._tasks.qsize()

    def start_one(self) -> bool:
        """Start a thread; return whether the system allowed it."""
        name = f"{self.name}-{self._count}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return False
        with self._lock:
            self._alive.add(thread)
            self._count += 1
        return True

    def end_some(self, count: int) -> None:
        """End this many threads, and wait until they have ended. For a pool without tasks."""
        with self._lock:
            self._count -= count
            former = list(self._alive)
        for _ in range(count):
            self._tasks.put(None)
        while len(self._alive) > self._count:
            time.sleep(0.001)
        for thread in former:
            if thread not in self._alive:
                thread.join()

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run a task on a free thread, or on the first that becomes free.

        Raises:
            RuntimeError: After ``shutdown``.
        """
        with self._lock:
            return self._submit(lambda: fn(*args, **kwargs))

    def submit_if_free(self, fn: Callable[[], R]) -> Future[R] | None:
        """Run a task on a free thread; return None if there is none.

        Raises:
            RuntimeError: After ``shutdown``.
        """
        with self._lock:
            return self._submit(fn) if self._count > self._unfinished else None

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more tasks, and end the threads once their tasks are done.

        Args:
            wait: Whether to wait until the threads have ended.
            cancel_futures: Whether to drop tasks that no thread has begun.
        """
        with self._lock:
            self._closed = True
            while cancel_futures and not self._tasks.empty():
                self._tasks.get()
            for _ in range(self._count):
                self._tasks.put(None)
            self._count = 0
        if wait:
            self.join()

    def join(self, seconds: float = threading.TIMEOUT_MAX) -> None:
        """Wait for the threads to end after ``shutdown``, at most this long in total."""
        ends = time.monotonic() + seconds
        for thread in list(self._alive):
            thread.join(max(0.0, ends - time.monotonic()))

    def _submit(self, call: Callable[[], R]) -> Future[R]:
        if self._closed:
            raise RuntimeError("the pool is shut down")
        future: Future[R] = Future()
        self._unfinished += 1
        self._tasks.put(lambda: self._run(call, future))
        return future

    def _run(self, call: Callable[[], R], future: Future[R]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - the future raises it for its caller
            future.set_exception(error)
            # Break the cycle from the error through this frame back to the error.
            del future
        else:
            future.set_result(result)

    def _work(self) -> None:
        try:
            self._run_tasks()
        finally:
            self._alive.discard(threading.current_thread())

    def _run_tasks(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            finally:
                # Deleted before the thread waits, or the task would live until the next one comes.
                del task
                with self._lock:
                    self._unfinished -= 1


class CallersThread(ThreadPoolExecutor):
    """Runs each task at once, in the submitting thread; only for tasks that never block."""

    def __init__(self) -> None:
        super().__init__(1)

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run the task and return its outcome as a future."""
        future: Future[R] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - the future raises it for its caller
            future.set_exception(error)
        return future


def run_in(threads: ThreadPoolExecutor, behaviour: Callable[P, R]) -> Callable[P, R]:
    """Return a gRPC handler's behaviour that runs on its own threads instead of the server's.

    gRPC has no public way to do this. It looks for this attribute, and tests/test_private_parts.py
    checks that it still does.
    """
    chosen = functools.partial(behaviour)
    chosen.experimental_thread_pool = threads  # type: ignore[attr-defined]
    return chosen


def start_threads(pools: Sequence[WorkerThreads], reserve: int = RESERVE) -> int:
    """Start the threads of several pools, one of each in turn.

    If the system refuses a thread, ``reserve`` threads are ended again, from the largest pools, so
    that the rest of the process can still start some.

    Args:
        pools: The pools, which have no threads yet.
        reserve: The number of threads to leave to others if there are too few.

    Returns:
        The number of missing threads; 0 if there are enough.

    Raises:
        UnavailableError: If a pool would have fewer than two threads.
    """
    missing = sum(pool.most for pool in pools)
    wanting = list(pools)
    while wanting:
        for pool in wanting:
            if not pool.start_one():
                return missing + _give_up(pools, reserve)
            missing -= 1
        wanting = [pool for pool in wanting if pool.count < pool.most]
    return 0


def _give_up(pools: Sequence[WorkerThreads], reserve: int) -> int:
    given = dict.fromkeys(pools, 0)
    while sum(given.values()) < reserve:
        largest = max(pools, key=lambda pool: pool.count - given[pool])
        if largest.count - given[largest] <= LEAST:
            break
        given[largest] += 1
    for pool, count in given.items():
        pool.end_some(count)
    if any(pool.count < LEAST for pool in pools):
        started = sum(pool.count for pool in pools)
        for pool in pools:
            pool.shutdown(wait=False)
        raise UnavailableError(
            f"got {started} threads for calls, expected at least {LEAST * len(pools)}: "
            f"{THREADS_REFUSED}"
        )
    return sum(given.values())


def start_thread(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        UnavailableError: If the system does not allow it.
    """
    try:
        thread.start()
    except RuntimeError as error:
        if not is_thread_refused(error):
            raise
        raise UnavailableError(THREADS_REFUSED) from None


def require_threads(count: int) -> None:
    """Raise UnavailableError if the system would not allow ``count`` more threads at once.

    For code that starts threads and can't handle a failure: OpenMP's library ends the process if it
    can't start one. This starts that many threads and ends them again, so other code may still take
    the last ones in between.

    Raises:
        UnavailableError: If the system would not allow them.
    """
    leave = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=leave.wait, name="layertap-probe", daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        raise UnavailableError(
            f"got {len(started)} more threads, expected {count}: {THREADS_REFUSED}"
        ) from None
    finally:
        leave.set()
        for thread in started:
            thread.join()
