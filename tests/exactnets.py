"""Networks of small whole numbers, whose values have the same bits on every machine.

Their weights are -2 to 2 and their inputs small whole numbers, so every sum is exact in float32, in
whatever order a kernel adds.
"""

from __future__ import annotations

import torch
from torch import nn

ITEM = (3, 8, 8)


def whole(module: nn.Module) -> nn.Module:
    """Give a module the same weights, between -2 and 2, each time."""
    generator = torch.Generator().manual_seed(11)
    for parameter in module.parameters():
        parameter.data = torch.randint(-2, 3, parameter.shape, generator=generator).float()
    return module.eval()


class Image(nn.Module):
    """A convolutional network with an addition, a module that runs twice, and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.split = Halves()
        self.pool = nn.AvgPool2d(4)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x) + x)
        low, high = self.split(x)
        return self.fc(self.pool(low - high).flatten(1))


class Halves(nn.Module):
    """Returns the first and the second half of the channels."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = x.chunk(2, 1)
        return low, high


class Tokens(nn.Module):
    """Looks ids up in a table and mixes the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 6)
        self.mix = nn.Linear(6, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.mix(self.embed(ids)).sum(1)


def image() -> nn.Module:
    """Return the image network."""
    return whole(Image())


def tokens() -> nn.Module:
    """Return the token network."""
    return whole(Tokens())
