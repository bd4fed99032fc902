"""Tiny networks of modules that are difficult for hooks, traces or the protocol.

All take ``[B, 3, 16, 16]`` float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from oddnets import script
from tinynets import seeded

quantization = torch.ao.quantization


class Head(nn.Module):
    """Two layers, one of them inside another module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(x))

    @torch.jit.export
    def halved(self, x: torch.Tensor) -> torch.Tensor:
        """Run a layer from a method other than forward."""
        return self.last(x) / 2


class Scripted(nn.Module):
    """An eager model with two programs of one class, and its own layer with the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.first = script(Head())
        self.second = script(Head())
        self.last = nn.Conv2d(2, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.conv(x))
        return self.last(self.first(y) + self.second(y) + self.first.halved(y))


class Quantized(nn.Module):
    """Statically quantised in the middle, floating-point at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = quantization.QuantStub()
        self.conv = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU()
        self.dequant = quantization.DeQuantStub()
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dequant(self.relu(self.conv(self.quant(x)))))


class Rows(nn.Module):
    """Linear layers for dynamic quantisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 8)
        self.second = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


class Spectrum(nn.Module):
    """A Fourier layer between two layers of real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Conv2d(3, 4, 1)
        self.fourier = Fourier()
        self.back = Back()
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.back(self.fourier(self.lift(x))))


class Fourier(nn.Module):
    """Returns complex numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft2(x)


class Back(nn.Module):
    """Takes complex numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft2(x)


class Threads(nn.Module):
    """Runs its branches in its own thread pool, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.a = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.b = nn.Conv2d(3, 4, 3)
        self.twice = nn.Conv2d(3, 4, 3)
        self.head = nn.Conv2d(16, 2, 1)
        self.pool = ThreadPoolExecutor(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        branches: list[tuple[nn.Module, torch.Tensor]] = [
            *((self.a, x), (self.b, x), (self.twice, x), (self.twice, x + 1)),
        ]
        parts = list(self.pool.map(lambda branch: branch[0](branch[1]), branches))
        return self.head(torch.cat(parts, 1))


def _quietly(make: Callable[[], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        # torch deprecates its eager quantisation.
        warnings.simplefilter("ignore")
        return make()


def quantized() -> nn.Module:
    """Return a seeded Quantized, calibrated and converted."""

    def make() -> nn.Module:
        net = seeded(Quantized)
        net.qconfig = quantization.get_default_qconfig("x86")
        net.head.qconfig = None
        quantization.prepare(net, inplace=True)
        net(torch.rand((4, 3, 16, 16), generator=torch.Generator().manual_seed(0)))
        return quantization.convert(net, inplace=True)

    return _quietly(make)


def dynamic() -> nn.Module:
    """Return a seeded Rows with linear layers that are quantised while they run."""
    return _quietly(lambda: quantization.quantize_dynamic(seeded(Rows), {nn.Linear}))


def scripted() -> nn.Module:
    """Return a seeded Scripted."""
    return seeded(Scripted)


def spectrum() -> nn.Module:
    """Return a seeded Spectrum."""
    return seeded(Spectrum)


def threads() -> nn.Module:
    """Return a seeded Threads."""
    return seeded(Threads)
