"""Factories that take long, for servers that are stopped meanwhile."""

from __future__ import annotations

import threading
import time

import torch
from torch import nn


class Sleepy(nn.Module):
    """Sleeps for as many milliseconds as its input's largest value says, from 1000.

    Takes ``[B, 3, 4, 4]`` float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Above what a measurement's random input reaches.
        seconds = float(x.max())
        if seconds >= 1000:
            time.sleep(seconds / 1000)
        return self.conv(x)


def sleepy() -> nn.Module:
    """Return a Sleepy."""
    return Sleepy()


class Dozing(nn.Module):
    """Sleeps for as many milliseconds as its input's largest value says, from 50.

    Takes ``[B, 3, 4, 4]`` float32.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        milliseconds = float(x.max())
        # As for Sleepy.
        if milliseconds >= 50:
            time.sleep(milliseconds / 1000)
        return self.pool(x * self.factor)


def dozing() -> nn.Module:
    """Return a Dozing."""
    return Dozing(1.0)


def dozing_twice() -> nn.Module:
    """Return a Dozing with values twice as large."""
    return Dozing(2.0)


GATE = threading.Event()


def gated() -> nn.Module:
    """Wait until GATE is set before it builds."""
    GATE.wait(60)
    return Sleepy()


def never() -> nn.Module:
    """Take longer to build than any test waits."""
    time.sleep(600)
    return Sleepy()


def loads_slowly() -> nn.Module:
    """Take long enough to build that a test can send requests meanwhile."""
    time.sleep(3)
    return Sleepy()
