"""A net with the layers that clients request, whose replies exceed gRPC's 4 MB."""

from __future__ import annotations

import torch
from torch import nn

from tinynets import seeded


class Large(nn.Module):
    """`layer1` is [B, 64, 224, 224] float32, 12.8 MB an item, avgpool's input a quarter of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.avgpool(self.pool(self.layer1(x)))


def build() -> nn.Module:
    return seeded(Large)
