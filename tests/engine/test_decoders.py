"""Inputs of a request are decoded in its own thread and in those of idle CPUs."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from layertap.call import Call
from layertap.engine.decoders import Decoders
from layertap.errors import CancelledError, DeadlineExceededError, InvalidInputError


@pytest.fixture
def two() -> Iterator[Decoders]:
    """Permits for two CPUs."""
    decoders = Decoders(2)
    yield decoders
    decoders.close()


def test_every_task_runs_once(two: Decoders) -> None:
    """All tasks have ended when the call returns, each having run once."""
    done: list[int] = []
    two.each(done.append, 100, Call())
    assert sorted(done) == list(range(100))


def test_an_idle_cpu_helps(two: Decoders) -> None:
    """With two CPUs two tasks run at once: each waits for the other."""
    together = threading.Barrier(2, timeout=20)
    threads: set[str] = set()

    def task(_index: int) -> None:
        together.wait()
        threads.add(threading.current_thread().name)

    two.each(task, 2, Call())

    assert len(threads) == 2
    assert threading.current_thread().name in threads


def test_a_lone_task_stays_in_its_thread(two: Decoders) -> None:
    """One image is not handed over, and no helper is started for it."""
    names: list[str] = []
    before = set(threading.enumerate())
    two.each(lambda _index: names.append(threading.current_thread().name), 1, Call())
    assert names == [threading.current_thread().name]
    assert set(threading.enumerate()) <= before


def test_busy_cpus_do_not_help(two: Decoders) -> None:
    """While other requests hold the permits, a request works alone and waits for its own only."""
    names: set[str] = set()
    with two.permit(Call()):
        two.each(lambda _index: names.add(threading.current_thread().name), 20, Call())
    assert names == {threading.current_thread().name}


def test_no_more_run_at_once_than_there_are_cpus() -> None:
    """Several requests with many tasks: never more tasks at once than permits."""
    decoders = Decoders(3)
    lock, running, most = threading.Lock(), [0], [0]

    def task(_index: int) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        threading.Event().wait(0.001)
        with lock:
            running[0] -= 1

    callers = [threading.Thread(target=decoders.each, args=(task, 30, Call())) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    decoders.close()
    assert 1 < most[0] <= 3


def test_the_first_error_is_raised(two: Decoders) -> None:
    """Of several errors the one with the lowest index is raised; nothing new begins after it."""
    together = threading.Barrier(2, timeout=20)
    begun: list[int] = []

    def task(index: int) -> None:
        begun.append(index)
        if index < 2:
            together.wait()
            raise InvalidInputError("damaged", image=index)

    for _ in range(20):
        begun.clear()
        with pytest.raises(InvalidInputError, match=r"images\[0\]"):
            two.each(task, 50, Call())
        assert len(begun) <= 3
    # The permits are free again.
    done: list[int] = []
    with two.permit(Call(5)), two.permit(Call(5)):
        done.append(1)
    assert done


def test_a_deadline_ends_the_wait_and_the_work(two: Decoders) -> None:
    """A call whose deadline passes neither waits for a permit nor decodes the rest."""
    with two.permit(Call()), two.permit(Call()), pytest.raises(DeadlineExceededError):
        two.each(lambda _index: None, 1, Call(0.01))
    done: list[int] = []

    def task(index: int) -> None:
        done.append(index)
        threading.Event().wait(0.02)

    with pytest.raises(DeadlineExceededError):
        two.each(task, 1000, Call(0.1))
    assert 0 < len(done) < 100


def test_a_caller_who_left_ends_the_work(two: Decoders) -> None:
    """After a cancellation no further image is decoded."""
    call = Call()
    done: list[int] = []

    def task(index: int) -> None:
        done.append(index)
        call.cancel()

    with pytest.raises(CancelledError):
        two.each(task, 1000, call)
    assert len(done) <= 2


def test_one_cpu_needs_no_helper() -> None:
    """With one CPU everything runs in the caller's thread."""
    decoders = Decoders(1)
    names: set[str] = set()
    decoders.each(lambda _index: names.add(threading.current_thread().name), 5, Call())
    decoders.close()
    assert names == {threading.current_thread().name}


def test_a_request_outlives_the_helpers(two: Decoders) -> None:
    """A request that is decoded while the engine closes goes on in its own thread."""
    two.each(lambda _index: None, 5, Call())
    two.close()
    names: list[str] = []
    two.each(lambda _index: names.append(threading.current_thread().name), 5, Call())
    assert names == [threading.current_thread().name] * 5
