"""What every benchmark needs: the machine's facts, and where results are kept."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def machine(*packages: str) -> dict[str, Any]:
    """Return what figures depend on, with the versions of some packages."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        # Other work on the machine makes every figure worse, and those of two processes most.
        "load average": round(os.getloadavg()[0], 1),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def _cpu() -> str:
    """Return the processor's name: Linux tells it in a file, others through Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> set[int]:
    """Return the cores that this process may run on."""
    return os.sched_getaffinity(0)


def environment() -> dict[str, str]:
    """Return the environment of an installed package, whose modules are compiled once."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def timed(call: Callable[[], object], calls: int) -> list[float]:
    """Return the milliseconds of each of some calls."""
    times = []
    for _ in range(calls):
        begun = time.perf_counter()
        call()
        times.append((time.perf_counter() - begun) * 1000)
    return times


def in_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, slow: Collection[str]
) -> dict[str, dict[str, float]]:
    """Time all ways in turns, and return the quartiles of each in milliseconds.

    Args:
        calls: The ways, by name.
        rounds: How often it is each way's turn.
        slow: The ways that are called once in a turn; the others are called five times.
    """
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(rounds):
        for way, call in calls.items():
            times[way] += timed(call, 1 if way in slow else 5)
    return {way: quantiles(took) for way, took in times.items()}


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """Return the quartiles and the 99th percentile."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {
        "p25": ordered[round(0.25 * last)],
        "p50": statistics.median(ordered),
        "p75": ordered[round(0.75 * last)],
        "p99": ordered[math.ceil(0.99 * last)],
    }


def save(name: str, results: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write a benchmark's results."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2) + "\n"
    (folder / f"{name}.json").write_text(text, "utf-8")


def load(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """Read a benchmark's results; None where it has not run yet."""
    file = folder / f"{name}.json"
    return json.loads(file.read_text("utf-8")) if file.exists() else None
