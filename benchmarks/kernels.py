"""What the device does during a call: how many kernels, for how long, and the gaps between them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Activity", "observe", "summary"]

_DEVICE_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
_WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Activity:
    """One kernel or copy on the device.

    Attributes:
        name: The kernel's name, or the kind of copy.
        begin: When it began, in microseconds from the call's first activity.
        duration: How long it took, in microseconds.
        stream: On which CUDA stream it ran.
    """

    name: str
    begin: float
    duration: float
    stream: int


def observe(call: Callable[[], object]) -> list[Activity]:
    """Run a call under PyTorch's profiler and return what the device did, in order."""
    for _ in range(_WARM_UP):
        call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    found = sorted(
        (event["ts"], event["dur"], event["name"], event["args"].get("stream", 0))
        for event in events
        if event.get("cat") in _DEVICE_CATEGORIES and event.get("ph") == "X"
    )
    first = found[0][0] if found else 0.0
    return [Activity(name, ts - first, dur, stream) for ts, dur, name, stream in found]


def summary(activities: list[Activity]) -> dict[str, float]:
    """Return the number of activities, and milliseconds busy, idle between them, and both.

    Activities of several streams that run at once count once.
    """
    busy = end = 0.0
    for each in activities:
        finish = each.begin + each.duration
        busy += max(0.0, finish - max(end, each.begin))
        end = max(end, finish)
    return {
        "kernels": len(activities),
        "busy_ms": busy / 1000,
        "gaps_ms": (end - busy) / 1000,
        "span_ms": end / 1000,
    }
