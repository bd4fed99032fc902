"""Nothing runs while a graph is traced, and nobody waits for ever."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from layertap.extraction.gate import forward_passes, no_forward_pass

PATIENCE = 30


def test_passes_run_together() -> None:
    """Two forward passes may be on their way at once."""
    both = threading.Barrier(2)

    def run() -> None:
        with forward_passes():
            both.wait(PATIENCE)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(run), pool.submit(run)]:
            done.result(PATIENCE)


def test_tracing_waits_for_passes_and_passes_wait_for_it() -> None:
    """A trace begins when the last pass has ended; a pass that comes meanwhile begins after it."""
    order: list[str] = []
    passing, trace_now = threading.Event(), threading.Event()

    def first() -> None:
        with forward_passes():
            passing.set()
            assert trace_now.wait(PATIENCE)
            threading.Event().wait(0.3)  # Time enough for a trace that doesn't wait.
            order.append("first pass")

    def trace() -> None:
        assert passing.wait(PATIENCE)
        trace_now.set()
        with no_forward_pass():
            late.start()
            late.join(0.05)
            order.append("trace")

    def second() -> None:
        with forward_passes():
            order.append("second pass")

    late = threading.Thread(target=second)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(first), pool.submit(trace)]:
            done.result(PATIENCE)
    late.join(PATIENCE)
    assert order == ["first pass", "trace", "second pass"]


def test_two_that_trace_in_the_middle_of_their_turns() -> None:
    """Neither waits for the end of the other's turn, and both trace alone."""
    both, tracing = threading.Barrier(2), []

    def run() -> None:
        with forward_passes():
            both.wait(PATIENCE)
            with no_forward_pass():
                tracing.append(1)
                assert len(tracing) == 1
                tracing.pop()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(run), pool.submit(run)]:
            done.result(PATIENCE)


def test_what_is_raised_opens_the_gate() -> None:
    """A trace or a pass that fails leaves nobody waiting."""
    with pytest.raises(KeyError), no_forward_pass():
        raise KeyError
    with pytest.raises(KeyError), forward_passes():
        raise KeyError
    with no_forward_pass():
        pass
