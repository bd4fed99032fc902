"""Thread pools whose threads exist beforehand, even if the system allows fewer than wanted."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest

from layertap.errors import UnavailableError
from layertap.threads import (
    CallersThread,
    WorkerThreads,
    is_thread_refused,
    require_threads,
    start_threads,
)
from processes import ENVIRONMENT

# Threads with stacks of 64 MiB in a process that may map 1 GiB more: the system itself refuses to
# start more than 15.
FEW = """
import json, resource, sys, threading
from layertap.errors import UnavailableError
from layertap.threads import WorkerThreads, require_threads, start_threads
threading.stack_size(64 << 20)
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + int(sys.argv[1]), -1))
pools = [WorkerThreads(20, "a"), WorkerThreads(20, "b"), WorkerThreads(3, "c")]
try:
    missing = start_threads(pools, reserve=4)
except UnavailableError as error:
    print(json.dumps(str(error)))
    raise SystemExit
done = [pool.submit(threading.get_ident).result(10) != threading.get_ident() for pool in pools]
require_threads(3)
try:
    require_threads(30)
    refused = ""
except UnavailableError as error:
    refused = str(error)
print(json.dumps([missing, [pool.count for pool in pools], done, refused]))
"""


def run_with(mapped_bytes: int) -> object:
    run = subprocess.run(
        [sys.executable, "-c", FEW, str(mapped_bytes)],
        env={**ENVIRONMENT, "MALLOC_ARENA_MAX": "1"},  # An arena takes address space as well.
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return json.loads(run.stdout)


def test_all_threads_exist_after_the_start() -> None:
    """Submitting starts no thread, however many tasks there are."""
    pool = WorkerThreads(3, "layertap-test")
    assert start_threads([pool]) == 0
    before = {t for t in threading.enumerate() if t.name.startswith("layertap-test")}
    assert len(before) == pool.count == 3
    assert [pool.submit(pow, n, 2).result(10) for n in range(20)] == [n * n for n in range(20)]
    assert {t for t in threading.enumerate() if t.name.startswith("layertap-test")} == before
    pool.shutdown()
    assert not any(thread.is_alive() for thread in before)


def test_a_fault_of_a_task_is_its_futures() -> None:
    """A task that raises leaves its thread to the next task."""
    pool = WorkerThreads(1, "layertap-test")
    start_threads([pool])
    failing = pool.submit(int, "x")
    with pytest.raises(ValueError, match="invalid literal"):
        failing.result(10)
    assert pool.submit(int, "7").result(10) == 7
    pool.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(int, "7")


def test_a_task_may_be_given_to_a_free_thread_only() -> None:
    """If every thread is busy the task is not accepted; once one is free it is."""
    pool = WorkerThreads(2, "layertap-test")
    start_threads([pool])
    release = threading.Event()
    held = [pool.submit_if_free(release.wait) for _ in range(2)]
    assert None not in held
    assert pool.submit_if_free(release.wait) is None
    queued = pool.submit(release.wait)
    assert pool.busy == 3
    release.set()
    assert queued.result(10)
    pool.shutdown()
    assert pool.busy == 0


def test_a_task_is_forgotten_once_it_is_done() -> None:
    """An idle thread keeps nothing of its last task alive."""

    class Large:
        gone = threading.Event()

        def __del__(self) -> None:
            self.gone.set()

    pool = WorkerThreads(1, "layertap-test")
    start_threads([pool])
    pool.submit(id, Large()).result(10)
    assert Large.gone.wait(10)
    pool.shutdown()


def test_the_callers_thread_runs_tasks_at_once() -> None:
    """A task's future is done when submit returns, and has its error."""
    pool = CallersThread()
    assert pool.submit(threading.get_ident).result(0) == threading.get_ident()
    assert isinstance(pool.submit(int, "x").exception(0), ValueError)


def test_pools_share_what_the_system_allows() -> None:
    """With too few threads each pool has some, tasks run, and other code can start threads."""
    missing, counts, done, refused = run_with(1 << 30)  # type: ignore[misc] # see FEW
    assert done == [True] * 3
    assert sum(counts) + missing == 43
    assert counts[2] == 3
    assert abs(counts[0] - counts[1]) <= 1
    assert 5 <= sum(counts) <= 11
    assert "expected 30: the system allows this process no more threads" in refused


def test_too_few_threads_are_an_error() -> None:
    """If a pool would have fewer than two threads, the start is refused with the reason."""
    assert "the system allows this process no more threads" in str(run_with(256 << 20))


def test_enough_threads_are_no_error() -> None:
    """If enough threads can be started, the check returns, and leaves none behind."""
    before = threading.active_count()
    require_threads(8)
    assert threading.active_count() == before
    assert issubclass(UnavailableError, Exception)


def test_a_refused_thread_is_recognised_by_pythons_words() -> None:
    """Python has no class for this error, so its text is the only sign."""
    former = threading.stack_size(1 << 46)
    try:
        with pytest.raises(RuntimeError) as caught:
            threading.Thread(target=int).start()
    finally:
        threading.stack_size(former)
    assert is_thread_refused(caught.value), "Python words it differently: see layertap/threads.py"
    assert not is_thread_refused(RuntimeError("threads can only be started once"))
