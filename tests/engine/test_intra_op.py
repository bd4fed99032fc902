"""Threads that run models use no more cores than the process may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from layertap.call import Call
from layertap.engine import intra_op
from layertap.engine.compute import ComputeThreads
from layertap.engine.loader_thread import run_in_loader_thread


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process that sees 8 cores and has a CPU quota."""
    former = torch.get_num_threads()
    torch.set_num_threads(8)
    monkeypatch.setattr(intra_op, "available_cpus", lambda: 8)
    yield monkeypatch
    torch.set_num_threads(former)


@pytest.mark.parametrize(("usable", "wanted", "cores"), [(8, None, 8), (3, None, 3), (3, 5, 5)])
def test_a_quota_limits_the_cores_of_a_pass(
    machine: pytest.MonkeyPatch, usable: int, wanted: int | None, cores: int
) -> None:
    """Unless a number of threads was given, a pass uses as many cores as the quota allows."""
    machine.setattr(intra_op, "available_cpus", lambda: usable)
    threads = ComputeThreads(1, wanted)
    try:
        assert threads.run(torch.get_num_threads, Call()) == cores
    finally:
        threads.close()


def test_a_quota_limits_the_cores_of_a_load(machine: pytest.MonkeyPatch) -> None:
    """A model that is loaded while requests run respects the quota too."""
    machine.setattr(intra_op, "available_cpus", lambda: 3)
    assert run_in_loader_thread(torch.get_num_threads, Call()) == 3
