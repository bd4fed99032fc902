"""Nets for which it is sure whether shared passes are faster, whatever else the machine does.

Each holds an operation that takes its time in whole milliseconds. TorchScript can't run it, so HOOK
serves them, declared layers too.
"""

from __future__ import annotations

import time

import torch
from torch import nn

ITEM = (3, 4, 4)


@torch.library.custom_op("sharenets::wait", mutates_args=())
def wait(x: torch.Tensor, per_pass: float, per_square: float) -> torch.Tensor:
    """Return a copy of a batch after some seconds for the pass, and for its size squared."""
    time.sleep(per_pass + per_square * len(x) ** 2)
    return x.clone()


class Waits(nn.Module):
    """A convolution that takes some seconds. Takes ``[B, 3, 4, 4]`` float32."""

    def __init__(self, per_pass: float, per_square: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.per_pass, self.per_square = per_pass, per_square

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.ops.sharenets.wait(x, self.per_pass, self.per_square))


def steady() -> nn.Module:
    """Return a net whose passes take 5 ms for any batch: eight in one are many times as fast."""
    torch.manual_seed(0)
    return Waits(0.005, 0.0).eval()


def quadratic() -> nn.Module:
    """Return a net that takes 1 ms for one item and 64 ms for eight: eight in one are slower."""
    torch.manual_seed(0)
    return Waits(0.0, 0.001).eval()
