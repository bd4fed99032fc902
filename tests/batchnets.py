"""Tiny nets that differ in whether requests may share a pass. All take [B, 3, 16, 16]."""

from __future__ import annotations

import torch
from torch import nn

from tinynets import seeded


class Mixes(nn.Module):
    """Subtracts the batch's mean, so an item's values depend on the other items."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.tail = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.tail(x - x.mean(0))


class Axes(nn.Module):
    """Has values whose batch is the second dimension, or is folded into the first with windows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 4, stride=4)
        self.sequence = nn.Identity()
        self.windows = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(2)  # [B, 6, 16]
        sequence = self.sequence(tokens.permute(2, 0, 1))  # [16, B, 6]
        folded = tokens.transpose(1, 2).reshape(-1, 4, 6)  # [4B, 4, 6]
        return self.windows(folded) + sequence.mean()


class Interleaved(nn.Module):
    """Interleaves the items' windows: the first window of all items, then the second."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 8, stride=8)
        self.windows = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(2)  # [B, 6, 4]
        return self.windows(tokens.permute(2, 0, 1).reshape(-1, 6))  # [4B, 6], window by window


def mixes() -> nn.Module:
    """Return a Mixes."""
    return seeded(Mixes)


def axes() -> nn.Module:
    """Return an Axes."""
    return seeded(Axes)


def interleaved() -> nn.Module:
    """Return an Interleaved."""
    return seeded(Interleaved)


class Turns(nn.Module):
    """Negates its values if any of them is large: one large item affects the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.tail = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        large = bool((x > 2).any())
        x = self.conv(x)
        return self.tail(-x if large else x)


def turns() -> nn.Module:
    """Return a Turns."""
    return seeded(Turns)
