"""Tiny networks whose input can't be determined from their first layer, and their inputs."""

from __future__ import annotations

import torch
from torch import nn

from tinynets import seeded


class Wave(nn.Module):
    """Takes raw waveforms ``[B, T]`` of any length from 12 on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 4, 5, 4)
        self.second = nn.Conv1d(4, 4, 2)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(wave[:, None])))


class Text(nn.Module):
    """Takes token ids ``[B, L]``, up to 16 of them; its first parameter is the root's own."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(16, 8))
        self.embed = nn.Embedding(50, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.embed(ids) + self.positions[: ids.shape[1]])


class RoundsIds(nn.Module):
    """Takes token ids of any dtype, as it rounds them itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids.long())


class Tabular(nn.Module):
    """Takes rows of two numbers and a category, as floats; it begins with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(6, 2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([rows[:, :2], self.embed(rows[:, 2].long())], 1))


class Series(nn.Module):
    """Takes series ``[B, T, 6]`` of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(series)[0])


class Squares(nn.Module):
    """Takes square images only, ``[B, 3, S, S]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y + y.transpose(-1, -2)


class Flattened(nn.Module):
    """Takes images of one size, as its last layer has a weight for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4 * 14 * 14, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).flatten(1))


class Divisible(nn.Module):
    """Takes images whose height and width are multiples of 8; it refuses others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] % 8 or x.shape[-2] % 8:
            raise ValueError(f"the image's size must be a multiple of 8, got {list(x.shape[-2:])}")
        return self.conv(x)


class Double(nn.Module):
    """Multiplies by a buffer of double precision, its only tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.rand(4, 4, dtype=torch.float64))
        self.out = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x @ self.matrix)


class Force(nn.Module):
    """A force field: differentiates its energy with respect to the positions ``[B, N, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))
        self.out = nn.Identity()

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            positions = positions.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.energy(positions).sum(), positions)
        return self.out(-gradient)


class QuietForce(Force):
    """The same, but silently returns zeros where it can't differentiate."""

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        try:
            return super().forward(positions)
        except RuntimeError:
            return self.out(torch.zeros_like(positions))


class Remembers(Wave):
    """A waveform model that counts its passes, in an attribute and in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0
        self.seen: list[int] = []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        self.seen.append(self.passes)
        self.count += 1
        return super().forward(wave) + self.count


def wave() -> nn.Module:
    """Return a seeded Wave."""
    return seeded(Wave)


def text() -> nn.Module:
    """Return a seeded Text."""
    return seeded(Text)


def rounds_ids() -> nn.Module:
    """Return a seeded RoundsIds."""
    return seeded(RoundsIds)


def tabular() -> nn.Module:
    """Return a seeded Tabular."""
    return seeded(Tabular)


def series() -> nn.Module:
    """Return a seeded Series."""
    return seeded(Series)


def squares() -> nn.Module:
    """Return a seeded Squares."""
    return seeded(Squares)


def flattened() -> nn.Module:
    """Return a seeded Flattened."""
    return seeded(Flattened)


def divisible() -> nn.Module:
    """Return a seeded Divisible."""
    return seeded(Divisible)


def double() -> nn.Module:
    """Return a seeded Double."""
    return seeded(Double)


def force() -> nn.Module:
    """Return a seeded Force."""
    return seeded(Force)


def quiet_force() -> nn.Module:
    """Return a seeded QuietForce."""
    return seeded(QuietForce)


def remembers() -> nn.Module:
    """Return a seeded Remembers."""
    return seeded(Remembers)
