"""Factories and a net whose own errors contain file names, like real ones."""

from __future__ import annotations

import torch
from torch import nn

SECRET = "/srv/customers/acme/credentials.json"


class Leaky(nn.Module):
    """Raises for input values from 1000, with a private text. Takes ``[B, 3, 4, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.max()) >= 1000:
            raise FileNotFoundError(2, "No such file", SECRET)
        return self.conv(x)


def leaky() -> nn.Module:
    """Return a Leaky."""
    return Leaky()


def broken() -> nn.Module:
    """Fail like a factory whose file is missing."""
    raise FileNotFoundError(2, "No such file", SECRET)
