"""Threads take batches from the queue, and no item is lost."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from layertap.batching import BatchPolicy, BatchQueue, ClosedError

FOREVER = BatchPolicy(max_size=8, max_delay=3600.0)


def test_what_is_put_is_taken_once() -> None:
    """Four threads take a thousand items of five keys: each item is taken once."""
    queue: BatchQueue[int] = BatchQueue()
    policy = BatchPolicy(max_size=4, max_delay=0.001)

    def take() -> list[int]:
        taken: list[int] = []
        while batch := queue.take():
            assert len({item % 5 for item in batch}) == 1
            taken.extend(batch)
        return taken

    with ThreadPoolExecutor(4) as pool:
        takers = [pool.submit(take) for _ in range(4)]
        for item in range(1000):
            queue.put(item, key=item % 5, policy=policy)
        queue.close()
        taken = [item for done in takers for item in done.result(60)]
    assert sorted(taken) == list(range(1000))


def test_an_item_counts_as_one_unless_it_says_more() -> None:
    """A batch of at most eight takes eight items whose size was not given."""
    queue: BatchQueue[int] = BatchQueue()
    for item in range(9):
        queue.put(item, key="k", policy=FOREVER)
    assert queue.take() == list(range(8))


def test_a_batch_that_is_held_back_goes_when_the_last_one_joins() -> None:
    """A thread waits for as many items as last time, and the one that completes them wakes it."""
    queue: BatchQueue[str] = BatchQueue()
    queue.put("warm", key="k", size=8, policy=FOREVER)
    assert queue.take() == ["warm"]
    for item in "ab":
        queue.put(item, key="k", policy=FOREVER)
    assert queue.take() == ["a", "b"]
    queue.put("c", key="k", policy=FOREVER)
    with ThreadPoolExecutor(1) as pool:
        taker = pool.submit(queue.take)
        assert not taker.done()
        queue.put("d", key="k", policy=FOREVER)
        assert taker.result(60) == ["c", "d"]


def test_a_batch_that_is_held_back_goes_when_its_time_is_up() -> None:
    """If nothing else arrives, the thread that waits for more items takes what is there."""
    queue: BatchQueue[str] = BatchQueue()
    policy = BatchPolicy(max_size=8, max_delay=0.05)
    for item in "ab":
        queue.put(item, key="k", policy=policy)
    assert queue.take() == ["a", "b"]
    queue.put("c", key="k", policy=policy)
    with ThreadPoolExecutor(1) as pool:
        taker = pool.submit(queue.take)
        try:
            assert taker.result(30) == ["c"]
        finally:
            queue.close()


def test_a_thread_that_holds_back_leaves_others_to_the_next() -> None:
    """While one thread waits for a batch to fill, other threads serve newer items."""
    queue: BatchQueue[str] = BatchQueue()
    for item in "ab":
        queue.put(item, key="k", policy=FOREVER)
    assert queue.take() == ["a", "b"]
    queue.put("held", key="k", policy=FOREVER)
    with ThreadPoolExecutor(2) as pool:
        takers = [pool.submit(queue.take) for _ in range(2)]
        queue.put("alone")
        queue.put("joins", key="k", policy=FOREVER)
        assert sorted(taker.result(60) for taker in takers) == [["alone"], ["held", "joins"]]


def test_one_item_that_makes_two_batches_ready_wakes_two_threads() -> None:
    """It is too large to join the one that is held back, so both go, and at once.

    The one notification of an item wakes one thread, which takes one of the batches. It has to wake
    another one, which would else sleep for as long as the first batch was to be held back.
    """
    queue: BatchQueue[str] = BatchQueue()
    for item in "ab":
        queue.put(item, key="k", policy=FOREVER)
    assert queue.take() == ["a", "b"]
    with ThreadPoolExecutor(2) as pool:
        takers = [pool.submit(queue.take) for _ in range(2)]
        try:
            queue.put("held", key="k", policy=FOREVER)
            until_they_wait(queue, 2)
            queue.put("large", key="k", size=8, policy=FOREVER)
            assert sorted(taker.result(10) for taker in takers) == [["held"], ["large"]]
        finally:
            queue.close()


def until_they_wait(queue: BatchQueue[str], threads: int) -> None:
    """Return once this many threads sleep in ``take``, with nothing that they could take."""
    for _ in range(1000):
        with queue._news:
            # Each of them has looked at what is there: none was notified and has not run yet.
            if len(queue._news._waiters) == threads:
                return
        time.sleep(0.01)
    pytest.fail("the threads never waited")


def test_closing_holds_nothing_back_and_loses_nothing() -> None:
    """Waiting items are still returned, then empty lists; no new item is accepted."""
    queue: BatchQueue[str] = BatchQueue()
    for item in "ab":
        queue.put(item, key="k", policy=FOREVER)
    assert queue.take() == ["a", "b"]
    queue.put("c", key="k", policy=FOREVER)
    threading.Timer(0.05, queue.close).start()
    assert queue.take() == ["c"]
    assert queue.take() == []
    with pytest.raises(ClosedError):
        queue.put("d")


def test_discarded_items_are_not_taken() -> None:
    """A discarded item leaves the queue, unless a thread has already taken it."""
    queue: BatchQueue[str] = BatchQueue()
    queue.put("a", key="k")
    queue.put("b", key="k")
    assert queue.discard("a")
    assert queue.take() == ["b"]
    assert not queue.discard("b")
