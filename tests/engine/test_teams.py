"""PyTorch's threads exist before the first request, or an error says why not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from processes import ENVIRONMENT

CODE = """
import json, os, resource, threading
from layertap.call import Call
from layertap.engine.compute import ComputeThreads
from layertap.engine.loader_thread import run_in_loader_thread
from layertap.errors import UnavailableError
import torch
threads = ComputeThreads(1, 3)
count = lambda: len(os.listdir("/proc/self/task"))
threads.run(lambda: None, Call())
before = count()
threads.run(lambda: torch.ones(1 << 22).mul_(2), Call())
team = [before, count()]
threads.close()
# Threads with stacks of 64 MiB, and room for two of them: a team of eight can't be had.
threading.stack_size(64 << 20)
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (160 << 20), -1))
told = []
for job in (lambda: ComputeThreads(8, 1), lambda: ComputeThreads(1, 8)):
    try:
        job()
    except UnavailableError as error:
        told.append(str(error))
print(json.dumps({"team": team, "told": told}))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, list]:
    """What a process saw that has an OpenMP team, and then no memory for another."""
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**ENVIRONMENT, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.long
def test_the_team_exists_before_the_first_large_tensor(found) -> None:
    """A compute thread's first parallel operation starts no thread."""
    before, after = found["team"]
    assert before == after


@pytest.mark.long
def test_teams_that_cannot_be_had_are_refused(found) -> None:
    """An error names the limit, before OpenMP's library would end the process."""
    told = found["told"]
    assert len(told) == 2
    assert all("expected 8: the system allows this process no more threads" in t for t in told)
