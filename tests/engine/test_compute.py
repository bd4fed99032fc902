"""One thread runs every job, in order; jobs that no caller waits for are dropped."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from layertap import errors
from layertap.call import Call
from layertap.engine import compute as compute_module
from layertap.engine.compute import ComputeThreads, Part
from streams import eventually


@pytest.fixture
def compute() -> Iterator[ComputeThreads]:
    """One compute thread."""
    compute = ComputeThreads()
    yield compute
    compute.close()


class Blocked:
    """A job that blocks the compute thread until it is released."""

    def __init__(self, compute: ComputeThreads) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: compute.run(self._job, Call()))
        self._thread.start()
        assert self.begun.wait(30)

    def _job(self) -> None:
        self.begun.set()
        assert self.go.wait(30)

    def release(self) -> None:
        """Release the thread."""
        self.go.set()
        self._thread.join()


def test_jobs_share_one_thread_and_run_without_gradients(compute) -> None:
    """Every job runs on the same thread, in inference mode."""
    seen = [
        compute.run(lambda: (threading.get_ident(), torch.is_inference_mode_enabled()), Call())
        for _ in range(3)
    ]
    assert len(set(seen)) == 1
    assert seen[0][0] != threading.get_ident()
    assert seen[0][1]


def test_what_a_job_raises_reaches_its_caller(compute) -> None:
    """An exception reaches the caller, even one with the type of an error of waiting."""
    own = "the job's own"
    for error in (KeyError("x"), TimeoutError(own), FutureCancelledError(own)):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error), match=str(error.args[0])):
            compute.run(fail, Call(timeout=30))


def test_a_deadline_that_passes_in_the_queue_drops_the_job(compute) -> None:
    """The caller gets the error at its deadline, and the job never runs."""
    blocked = Blocked(compute)
    ran: list[str] = []
    with pytest.raises(errors.DeadlineExceededError):
        compute.run(lambda: ran.append("late"), Call(timeout=0.05))
    blocked.release()
    compute.run(lambda: None, Call())
    assert ran == []


def test_a_cancelled_caller_is_dropped(compute) -> None:
    """A job whose caller leaves before its turn never runs."""
    blocked = Blocked(compute)
    ran: list[str] = []
    call = Call()
    threading.Timer(0.05, call.cancel).start()
    with pytest.raises(errors.CancelledError):
        compute.run(lambda: ran.append("gone"), call)
    blocked.release()
    compute.run(lambda: None, Call())
    assert ran == []


def test_a_call_that_is_over_already_runs_nothing(compute) -> None:
    """A call that is cancelled or expired before submission is refused without running."""
    cancelled, ran = Call(), []
    cancelled.cancel()
    with pytest.raises(errors.CancelledError):
        compute.run(lambda: ran.append(1), cancelled)
    with pytest.raises(errors.DeadlineExceededError):
        compute.run(lambda: ran.append(1), Call(timeout=0))
    assert ran == []


def test_after_close_nothing_is_admitted(compute) -> None:
    """A closed thread refuses jobs."""
    compute.close()
    with pytest.raises(errors.UnavailableError):
        compute.run(lambda: None, Call())


def test_instances_run_at_once_each_on_its_cores() -> None:
    """Two instances run two jobs at the same time, on their own threads with one core each."""
    compute = ComputeThreads(instances=2, intra_op=1)
    both = threading.Barrier(2)

    def job() -> tuple[int, int]:
        both.wait(30)
        return threading.get_ident(), torch.get_num_threads()

    with ThreadPoolExecutor(2) as pool:
        seen = [done.result(30) for done in [pool.submit(compute.run, job, Call()) for _ in "ab"]]
    compute.close()
    assert seen[0][0] != seen[1][0]
    assert [threads for _, threads in seen] == [1, 1]


def test_the_parts_of_a_request_run_on_all_threads() -> None:
    """Two parts meet each other, which one thread alone could not do; results keep the order."""
    compute, meeting = ComputeThreads(instances=2, intra_op=1), threading.Barrier(2, timeout=30)

    def run(items: Sequence[int]) -> list[int]:
        meeting.wait()
        return [item * 10 for item in items]

    try:
        assert compute.run_each([Part(1), Part(2)], run, Call()) == [10, 20]
    finally:
        compute.close()


def test_if_a_part_fails_the_waiting_ones_do_not_run(compute) -> None:
    """The error reaches the caller, and the compute thread is free for other requests."""
    ran: list[int] = []

    def run(items: Sequence[int]) -> list[int]:
        ran.extend(items)
        if items[0]:
            threading.Event().wait(0.02)  # The caller wakes up meanwhile.
        raise KeyError(items[0])

    blocked = Blocked(compute)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(compute.run_each, [Part(number) for number in range(50)], run, Call())
        while len(compute._queue._batcher) < 50:
            threading.Event().wait(0.002)
        blocked.release()
        with pytest.raises(KeyError, match="0"):
            done.result(30)
    assert len(ran) < 50
    assert not len(compute._queue._batcher)


def test_jobs_are_refused_once_the_device_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that waited get the reason as well, and the threads count as not alive.

    What a GPU says when it is lost is tested on one (``test_cuda.py``).
    """
    monkeypatch.setattr(compute_module, "loss_of", lambda device, _: f"device {device} is lost")
    threads = ComputeThreads(device=torch.device("cuda", 0))
    try:
        assert threads.run(lambda: 1, Call()) == 1
        assert threads.alive
        blocked = Blocked(threads)
        with ThreadPoolExecutor(2) as pool:
            failing = pool.submit(threads.run, lambda: 1 // 0, Call())
            eventually(lambda: len(threads._queue._batcher) == 1)
            waiting = pool.submit(threads.run, lambda: 2, Call())
            eventually(lambda: len(threads._queue._batcher) == 2)
            blocked.release()
            with pytest.raises(ZeroDivisionError):
                failing.result(30)
            with pytest.raises(errors.UnavailableError, match="cuda:0 is lost"):
                waiting.result(30)
        assert not threads.alive
        with pytest.raises(errors.UnavailableError, match="cuda:0 is lost"):
            threads.run(lambda: 3, Call())
        assert [r.message for r in caplog.records if r.levelname == "CRITICAL"] == [
            "device cuda:0 is lost"
        ]
    finally:
        threads.close()
