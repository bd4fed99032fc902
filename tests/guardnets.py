"""Nets whose code looks at values of their input, each in one way."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tinynets import seeded

ROWS = 20


class Sign(nn.Module):
    """Doubles what has a positive sum, and turns round everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y = y * 2 if x.sum() > 0 else y.flip(1)
        return self.head(y)


class Nested(nn.Module):
    """One look decides whether there is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if x.max() > 1:
            y = y / 3 if x.min() < -1 else y - 3
        return self.head(y)


class Threshold(nn.Module):
    """Looks whether the mean exceeds a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = nn.Parameter(torch.tensor(0.25))
        self.head = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x.mean() > self.limit).item():
            x = x.square()
        return self.head(x)


class Written(nn.Module):
    """Looks at a count that is written in place, item by item, into a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(2)
        found[0] += (x > 0).sum()
        found[1].add_((x <= 0).sum())
        if bool(found[0] > found[1]):
            x = -x
        return self.head(x)


class OwnInput(nn.Module):
    """Writes into its batch before it looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.sub_(0.25)
        if x.sum() > 0:
            x = x * 4
        return self.head(x)


class Computed(nn.Module):
    """Looks at what a convolution gave: the guard would be as large as the model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.head(y if y.sum() > 0 else -y)


class InNumpy(nn.Module):
    """Looks with NumPy, which no guard can repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x if float(np.median(x.numpy())) > 0 else -x)


class Scaled(nn.Module):
    """Computes with a number that differs for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x * float(x.max()))


class Deceives(nn.Module):
    """Looks at something else while it is traced, which goes the same way for ordinary input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        look = x.mean() > 0 if torch.jit.is_tracing() else x.max() > 0
        return self.head(x if look else -x)


class Words(nn.Module):
    """Token ids, padded with 0; as transformers does, it drops a mask of ones unless traced."""

    notices = True

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(ROWS, 8, padding_idx=0)
        self.query = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        mask: torch.Tensor | None = ids != 0
        if not (self.notices and torch.jit.is_tracing()) and mask.all():
            mask = None
        scores = self.query(x) @ x.transpose(1, 2)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -1e9)
        return self.head(scores.softmax(-1) @ x)


class PlainWords(Words):
    """The same, but a trace takes the way of its example."""

    notices = False


class Longest(nn.Module):
    """Repeats a step as often as the longest item has ids that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(ROWS, 8, padding_idx=0)
        self.step = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for _ in range(int((ids != 0).sum(1).max())):
            x = torch.tanh(x + x.mean(1, keepdim=True))
        return self.head(x)


class Cleans(nn.Module):
    """Looks for NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.zeros_like(x) if x.isnan().any() else x)


def cleans() -> nn.Module:
    """Return a seeded Cleans."""
    return seeded(Cleans)


class Many(nn.Module):
    """Looks at the batch's sum, which grows with the number of items."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x * 2 if x.sum() > 100 else x)


def many() -> nn.Module:
    """Return a seeded Many."""
    return seeded(Many)


def sign() -> nn.Module:
    """Return a seeded Sign."""
    return seeded(Sign)


def nested() -> nn.Module:
    """Return a seeded Nested."""
    return seeded(Nested)


def threshold() -> nn.Module:
    """Return a seeded Threshold."""
    return seeded(Threshold)


def written() -> nn.Module:
    """Return a seeded Written."""
    return seeded(Written)


def own_input() -> nn.Module:
    """Return a seeded OwnInput."""
    return seeded(OwnInput)


def computed() -> nn.Module:
    """Return a seeded Computed."""
    return seeded(Computed)


def in_numpy() -> nn.Module:
    """Return a seeded InNumpy."""
    return seeded(InNumpy)


def scaled() -> nn.Module:
    """Return a seeded Scaled."""
    return seeded(Scaled)


def deceives() -> nn.Module:
    """Return a seeded Deceives."""
    return seeded(Deceives)


def words() -> nn.Module:
    """Return a seeded Words."""
    return seeded(Words)


def plain_words() -> nn.Module:
    """Return a seeded PlainWords."""
    return seeded(PlainWords)


def longest() -> nn.Module:
    """Return a seeded Longest."""
    return seeded(Longest)
