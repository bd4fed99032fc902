"""A network whose every value shows which version computed it, and for which request."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

SIDE = 64


class Telling(nn.Module):
    """Constant layers on a constant input, exact in float32, behind some milliseconds of work.

    Takes ``[B, 3, 64, 64]``. With c in every element and weights of version v, ``first`` is 3cv and
    ``third`` is v(12c + 1).
    """

    def __init__(self, version: int, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1, bias=False)
        self.burn = nn.Sequential(
            nn.Conv2d(4, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.Tanh()
        )
        self.third = nn.Conv2d(4, 4, 1)
        nn.init.constant_(self.first.weight, version)
        nn.init.ones_(self.third.weight)
        nn.init.constant_(self.third.bias, version)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        return self.third(first + 0 * self.burn(first).mean())


def build() -> nn.Module:
    """Return version 0: a factory, whose weights come from a file."""
    return Telling(0)


def build_heavy() -> nn.Module:
    """Return version 1 with about as much work as a ResNet-18 has: 1.9 billion multiplications."""
    return Telling(1, width=240)


def save_weights(file: Path, version: int) -> None:
    """Write the weights of a version atomically."""
    part = file.with_suffix(".part")
    torch.save(Telling(version).state_dict(), part)
    part.replace(file)
