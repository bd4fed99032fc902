"""Nothing runs while a graph is traced, and nobody waits forever."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional

from layertap.extraction import Taps, measure
from layertap.extraction.gate import forward_passes, no_forward_pass
from layertap.extraction.points import CapturePoint, PointKind
from layertap.extraction.samples import ordinary_batch
from layertap.models import ModelSpec, load_model
from tinynets import ITEM

PATIENCE = 30


def test_passes_run_together() -> None:
    """Two forward passes may run at the same time."""
    both = threading.Barrier(2)

    def run() -> None:
        with forward_passes():
            both.wait(PATIENCE)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(run), pool.submit(run)]:
            done.result(PATIENCE)


def test_tracing_waits_for_passes_and_passes_wait_for_it() -> None:
    """A trace begins when the last pass has ended; a pass that arrives meanwhile waits."""
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


def test_a_model_that_replaces_functions_of_torch_runs_alone() -> None:
    """While one of its passes runs, no pass of any model does; torch is unchanged afterwards."""
    model = load_model(ModelSpec("claimnets:patches", item_shape=ITEM))
    relu = functional.relu
    order: list[str] = []

    def other() -> None:
        with forward_passes():
            order.append("other model")

    with torch.inference_mode():
        scope = measure(model).scope
        assert scope.rules.exclusive
        assert not scope.rules.concurrent
        assert "no pass of any model runs at the same time" in scope.rules.notes[0]
        late = threading.Thread(target=other)
        point = CapturePoint(PointKind.MODULE, "first")
        with forward_passes(), scope:
            late.start()
            late.join(0.1)
            Taps(model.module).run(
                model.forward, ordinary_batch(model, 1), [point], lambda *_: None
            )
            order.append("this model")
        late.join(PATIENCE)
    assert functional.relu is relu
    assert order == ["this model", "other model"]
