"""A network that a test in the same process can block in the middle of a forward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

HELD = 1000.0
"""An input with this value waits at the gate; above what a measurement's random input reaches."""


class Gate:
    """A gate at which forward passes wait, one at a time, as a model runs one at a time."""

    def __init__(self) -> None:
        self.arrivals = threading.Semaphore(0)
        self.passed = 0
        self._open = threading.Event()

    def wait(self) -> None:
        self.arrivals.release()
        assert self._open.wait(60), "nobody opened the gate"
        self.passed += 1

    def open(self) -> None:
        self._open.set()

    def arrived(self) -> None:
        """Return once a forward pass is at the gate."""
        assert self.arrivals.acquire(timeout=60), "no forward pass came to the gate"


_gates: list[Gate] = []


@contextmanager
def gate() -> Iterator[Gate]:
    """Yield a closed gate, which is opened at the end in any case."""
    _gates.append(Gate())
    try:
        yield _gates[-1]
    finally:
        _gates[-1].open()


class Gated(nn.Module):
    """Waits at the newest gate if its input says so. Takes ``[B, 3, 4, 4]`` float32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.max()) >= HELD:
            _gates[-1].wait()
        return self.conv(x)


def gated() -> nn.Module:
    """Return a Gated."""
    return Gated().eval()
