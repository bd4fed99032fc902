"""Nets for EXPORT. A package takes long to compile, so one net has many hazards at once."""

from __future__ import annotations

import torch
from torch import nn

from tinynets import seeded

ITEM = (3, 12, 12)
WIDTH = 16


class Split(nn.Module):
    """Returns a tuple, whose first member the caller overwrites later."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + 1, x * 2


class Hazards(nn.Module):
    """Two inputs, in-place operations behind captures, second calls, a tuple, constants.

    Of the constants one is made of a range, one of numbers, and one is a tensor that torch does not
    know.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.split = Split()
        self.mix = nn.Conv2d(WIDTH, WIDTH, 1)
        self.head = nn.Linear(WIDTH, 1000)
        self.hidden = [torch.randn(1, WIDTH, 1, 1)]

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        left = self.relu(self.bn(self.conv(left)))
        right = self.relu(self.bn(self.conv(right)))
        low, high = self.split(left)
        low += right
        table = torch.arange(WIDTH, dtype=left.dtype).view(1, WIDTH, 1, 1)
        weights = torch.tensor([1.5 - 0.1 * number for number in range(WIDTH)]).view(-1, 1, 1)
        low = low * weights + self.hidden[0]
        return self.head(self.mix(low * high + table).mean((2, 3)))


class Branches(nn.Module):
    """Goes another way for some inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = bool(x.mean() > 0)
        x = self.first(x)
        return self.second(x if up else -x)


class Memory:
    """Something that a pass left, out of sight of torch.export."""

    kept: torch.Tensor | None = None


class Remembers(nn.Module):
    """Keeps a tensor of its pass, but only while it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.memory = Memory()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.memory.kept is not None:
            x = x + self.memory.kept.mean()
        if torch.compiler.is_exporting():
            self.memory.kept = x * 2
        return self.first(x)


def hazards() -> nn.Module:
    return seeded(Hazards)


def branches() -> nn.Module:
    return seeded(Branches)


def remembers() -> nn.Module:
    return seeded(Remembers)
