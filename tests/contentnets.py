"""Tiny networks with tensors that are not dense, or hold other tensors as torchao's weights do."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import nn
from torch.utils._pytree import tree_map

from tinynets import seeded

ITEM = (6,)


class Int8(torch.Tensor):
    """Rows of int8 with a scale each, which operations see as float32.

    It is made as torch's own documents make a wrapper subclass: without memory of its own.
    """

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> Int8:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.data_, self.scale = data, scale

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Int8:
        """Return a tensor with its rows rounded to 255 steps."""
        tensor = tensor.detach()
        scale = tensor.abs().amax(-1, keepdim=True) / 127
        return cls((tensor / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], *_: Any) -> Int8:
        return cls(inner["data_"], inner["scale"])

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].data_, args[0].scale)
        if func not in _COMPUTES:
            raise NotImplementedError(f"{cls.__name__} has no {func}")
        plain = tree_map(lambda each: _plain(each) if isinstance(each, cls) else each, args)
        return func(*plain, **(kwargs or {}))


_COMPUTES = {
    torch.ops.aten.t.default,
    torch.ops.aten.linear.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
}
"""What can be done with an Int8; as with torchao's tensors, everything else is an error."""


def _plain(tensor: Int8) -> torch.Tensor:
    return tensor.data_ * tensor.scale


class Opaque(Int8):
    """Keeps its tensors where nobody finds them."""

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.hidden = [data, scale]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return [], None

    def __getattr__(self, name: str) -> torch.Tensor:
        return self.hidden[["data_", "scale"].index(name)]


class CopiesLayer(nn.Module):
    """Copies a layer, with its parameters, while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return copy.deepcopy(self.last)(self.first(x)) + self.last(self.first(x))


class Quantised(nn.Module):
    """Its middle layer has a quantised weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.middle = nn.Linear(5, 4)
        self.middle.weight = nn.Parameter(Int8.of(self.middle.weight), requires_grad=False)
        self.last = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x).relu()))


class Rescales(Quantised):
    """Each pass writes into the scale of the weight, in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.middle.weight.scale.mul_(1.5)
        return super().forward(x)


class Requantises(Quantised):
    """Each pass gives the weight another scale."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.middle.weight.scale = self.middle.weight.scale * 1.5
        return super().forward(x)


class Rounds(nn.Module):
    """A layer that returns a quantised tensor."""

    def forward(self, x: torch.Tensor) -> Int8:
        return Int8.of(x)


class QuantisesActivations(nn.Module):
    """A layer returns a quantised activation, with which the next one computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.rounds = Rounds()
        self.last = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.last(self.rounds(self.first(x))))


class Graph(nn.Module):
    """A graph convolution, whose neighbours are a sparse tensor, with a statistic nobody uses."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        neighbours = torch.rand(5, 5)
        neighbours[neighbours < 0.6] = 0
        with warnings.catch_warnings():  # torch's support of compressed rows "is in beta state".
            warnings.simplefilter("ignore")
            sparse = neighbours.to_sparse(layout=layout)
        self.neighbours = nn.Parameter(sparse, requires_grad=False)
        self.last = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mean()
        return self.last((self.neighbours @ self.first(x).T).T)


class Spectral(nn.Module):
    """A Fourier layer with complex weights, and a buffer that is a conjugate view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.modes = nn.Parameter(torch.rand(4, 4, dtype=torch.cfloat))
        self.register_buffer("phases", torch.rand(6, dtype=torch.cfloat).conj())
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.fft.irfft(torch.fft.rfft(self.first(x)) @ self.modes, n=6)
        return self.last(mixed + self.phases.imag)


class Packed(nn.Module):
    """Has a quantised buffer with a scale for each of many channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.scales = torch.full((2000,), 0.5)
        self.last = nn.Linear(5, 3)
        self.pack()

    def pack(self) -> None:
        """Quantise a table with the scales."""
        zeros = torch.zeros(2000, dtype=torch.int64)
        with warnings.catch_warnings():  # torch calls them deprecated.
            warnings.simplefilter("ignore")
            table = torch.quantize_per_channel(
                self.scales[:, None].expand(-1, 5), self.scales, zeros, 0, torch.qint8
            )
        self.register_buffer("table", table)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x) + self.table[0].dequantize())


def packed() -> nn.Module:
    """Return a seeded Packed."""
    return seeded(Packed)


def graph() -> nn.Module:
    """Return a seeded Graph with coordinates."""
    return seeded(lambda: Graph(torch.sparse_coo))


def compressed() -> nn.Module:
    """Return a seeded Graph with compressed rows."""
    return seeded(lambda: Graph(torch.sparse_csr))


def spectral() -> nn.Module:
    """Return a seeded Spectral."""
    return seeded(Spectral)


def quantised() -> nn.Module:
    """Return a seeded Quantised."""
    return seeded(Quantised)


def copies_layer() -> nn.Module:
    """Return a seeded CopiesLayer."""
    return seeded(CopiesLayer)


def opaque() -> nn.Module:
    """Return a seeded Quantised whose weight is Opaque."""
    net = quantised()
    weight = net.middle.weight
    net.middle.weight = nn.Parameter(Opaque(weight.data_, weight.scale), requires_grad=False)
    return net


def rescales() -> nn.Module:
    """Return a seeded Rescales."""
    return seeded(Rescales)


def requantises() -> nn.Module:
    """Return a seeded Requantises."""
    return seeded(Requantises)


def quantises_activations() -> nn.Module:
    """Return a seeded QuantisesActivations."""
    return seeded(QuantisesActivations)
