"""Callers in processes of their own, whatever they call.

``CallerProcesses`` starts processes and spreads callers among them, so that one interpreter's lock
does not limit the load. Such a process calls ``answer_orders``: it reads orders, a JSON object a
line, from its standard input, and ends with it. Needs nothing but Python, as it also runs in the
environments of other servers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

__all__ = ["Answered", "CallerProcesses", "Connect", "answer_orders"]

WARM_CALLS = 2

Connect = Callable[[dict[str, Any]], AbstractContextManager[Callable[[], object]]]
"""Takes an order, yields what makes one call, on a connection of its own."""


@dataclass(frozen=True)
class Answered:
    """What callers got.

    Attributes:
        ends: For each answer, the seconds from the common begin to its end.
        times: For each answer, its milliseconds.
    """

    ends: list[float]
    times: list[float]


class CallerProcesses:
    """Processes that make calls.

    Args:
        command: Starts one.
        processes: How many.
        environment: Their environment variables; None for those of this process.
    """

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            for _ in range(processes)
        ]

    def load(
        self,
        order: dict[str, Any],
        callers: int,
        seconds: float,
        *,
        least: int = 0,
        warm: int = WARM_CALLS,
    ) -> Answered:
        """Let callers call without a pause.

        Args:
            order: What they call; ``Connect`` gets it.
            callers: How many call at once, each on a connection of its own.
            seconds: After this time, no call is begun.
            least: Calls that each makes even if they take longer.
            warm: Calls that each makes before, which do not count.
        """
        used = self._processes[: min(callers, len(self._processes))]
        shares = [callers // len(used) + (i < callers % len(used)) for i in range(len(used))]
        for process, share in zip(used, shares, strict=True):
            each = {"callers": share, "seconds": seconds, "least": least, "warm": warm}
            _tell(process, {**order, **each})
        for process in used:  # Until the slowest has connected and warmed up.
            _hear(process)
        for process in used:
            _tell(process, {"begin": time.time() + 0.05})
        answered = Answered([], [])
        for process in used:
            ends, times = _hear(process)
            answered.ends.extend(ends)
            answered.times.extend(times)
        return answered

    def ask(self, order: dict[str, Any]) -> Any:
        """Let the first process answer an order of another kind; see ``answer_orders``."""
        _tell(self._processes[0], order)
        return _hear(self._processes[0])

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.communicate()


def answer_orders(connect: Connect, other: Callable[[dict[str, Any]], Any] | None = None) -> None:
    """Do what standard input orders, until it ends.

    Args:
        connect: For the orders of ``CallerProcesses.load``.
        other: Answers those of ``CallerProcesses.ask``.
    """
    while line := sys.stdin.readline():
        order = json.loads(line)
        if other is None or "callers" in order:
            answer: Any = _load(connect, order)
        else:
            answer = other(order)
        print(json.dumps(answer), flush=True)


def _load(connect: Connect, order: dict[str, Any]) -> tuple[list[float], list[float]]:
    warm, begin = (threading.Barrier(order["callers"] + 1) for _ in range(2))
    at = 0.0

    def call() -> list[tuple[float, float]]:
        with connect(order) as once:
            for _ in range(order["warm"]):
                once()
            warm.wait()
            begin.wait()
            time.sleep(max(0.0, at - time.time()))
            got: list[tuple[float, float]] = []
            while time.time() < at + order["seconds"] or len(got) < order["least"]:
                begun = time.perf_counter()
                once()
                got.append((time.time() - at, (time.perf_counter() - begun) * 1000))
        return got

    def guarded() -> list[tuple[float, float]]:
        try:
            return call()
        except BaseException:
            warm.abort()  # Otherwise the others wait forever for a caller that failed.
            begin.abort()
            raise

    with ThreadPoolExecutor(order["callers"]) as pool:
        taken = [pool.submit(guarded) for _ in range(order["callers"])]
        try:
            warm.wait()
        except threading.BrokenBarrierError:
            _raise_cause([done.exception() for done in taken])
        print("true", flush=True)
        at = json.loads(sys.stdin.readline())["begin"]
        begin.wait()
        pairs = [each for got in taken for each in got.result()]
    return [end for end, _ in pairs], [took for _, took in pairs]


def _raise_cause(errors: Sequence[BaseException | None]) -> None:
    """Raise the error that broke a barrier."""
    for error in errors:
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error


def _tell(process: subprocess.Popen[str], what: Any) -> None:
    assert process.stdin is not None
    print(json.dumps(what), file=process.stdin, flush=True)


def _hear(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a process of callers ended with {process.wait()}")
    return json.loads(line)
