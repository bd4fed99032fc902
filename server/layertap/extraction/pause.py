"""A step of a generator that only waits for something outside of this process."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Pause", "run_to_end", "wait", "waiting"]


@dataclass(frozen=True, slots=True)
class Pause:
    """Says that the next step need not come before so many seconds.

    A caller that runs the steps on a compute thread waits on another thread, so that the compute
    thread can serve requests in the meantime.
    """

    seconds: float


R = TypeVar("R")


def wait(step: object) -> None:
    """Wait if a step is a pause."""
    if isinstance(step, Pause):
        time.sleep(step.seconds)


def waiting(steps: Generator[Pause | None, None, R]) -> Generator[None, None, R]:
    """Run steps, and wait here where one is a pause; return what they return."""
    while True:
        try:
            wait(next(steps))
        except StopIteration as end:
            result: R = end.value
            return result
        yield


def run_to_end(steps: Generator[Pause | None, None, R]) -> R:
    """Run steps to their end, and wait where one is a pause; return what they return."""
    while True:
        try:
            wait(next(steps))
        except StopIteration as end:
            result: R = end.value
            return result
