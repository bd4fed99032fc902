"""Tiny networks that random input in [0, 1) does not test enough. All take [B, 3, 16, 16]."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from tinynets import seeded


def script(net: nn.Module) -> torch.jit.ScriptModule:
    """Return a net as a TorchScript program, without torch.jit's deprecation warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(net)


class Clamps(nn.Module):
    """Clamps its input before its first child, which changes nothing in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.tail = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.conv(x.clamp(0, 1)))


def clamps() -> nn.Module:
    """Return a seeded Clamps."""
    return seeded(Clamps)


class ClampsInPlace(Clamps):
    """The same with a statement whose result is unused, which dead-code elimination removes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x.clamp_(0, 1)
        return self.tail(self.conv(x))


def clamps_in_place() -> nn.Module:
    """Return a seeded ClampsInPlace."""
    return seeded(ClampsInPlace)


class Peaks(Clamps):
    """Divides by the batch's peak if that is over 1: one loud item makes the others quieter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.conv(x / x.abs().amax().clamp(min=1)))


def peaks() -> nn.Module:
    """Return a seeded Peaks."""
    return seeded(Peaks)


class Recurrent(Clamps):
    """Adds up its inputs: its state depends on its state."""

    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros(4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        self.state = (y.mean((0, 2, 3), keepdim=True)[0] + self.state) / 2
        return self.tail(y + self.state)


def recurrent() -> nn.Module:
    """Return a seeded Recurrent."""
    return seeded(Recurrent)


class Counts(Clamps):
    """Counts its passes in a buffer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes.add_(1)
        return self.tail(self.conv(x))


def counts() -> nn.Module:
    """Return a seeded Counts."""
    return seeded(Counts)


class Remembers(Clamps):
    """Keeps inputs in a list of constant length."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = [torch.zeros(())]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.memory[0] = x.mean()
        return self.tail(self.conv(x))


def remembers() -> nn.Module:
    """Return a seeded Remembers."""
    return seeded(Remembers)


class Sizes(Clamps):
    """Takes another branch if many values are large, by the length of a list of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        large = x[x > 2]
        return self.tail(-x if len(large) > 8 else x)


def sizes() -> nn.Module:
    """Return a seeded Sizes."""
    return seeded(Sizes)


class OnlyTensors(Clamps):
    """Changes tensors only, and not the symbols of a symbolic trace."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            x = x / 2
        return self.tail(self.conv(x) + 1)


def only_tensors() -> nn.Module:
    """Return a seeded OnlyTensors."""
    return seeded(OnlyTensors)


class Tries(Clamps):
    """Continues with something else if a child fails."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            y = self.conv(x)
        except Exception:  # noqa: BLE001 - as authors do
            y = torch.zeros(len(x), 4, 16, 16)
        return self.tail(y)


def tries() -> nn.Module:
    """Return a seeded Tries."""
    return seeded(Tries)


class Sparse(Clamps):
    """Multiplies by a sparse matrix, which has no plain memory."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mixing", torch.eye(16).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.sparse.mm(self.mixing, x.permute(2, 0, 1, 3).reshape(16, -1))
        return self.tail(self.conv(rows.reshape(16, len(x), 3, 16).permute(1, 2, 0, 3)))


def sparse() -> nn.Module:
    """Return a seeded Sparse."""
    return seeded(Sparse)


class Lazy(nn.Module):
    """A layer that learns its size from the first input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


def lazy() -> nn.Module:
    """Return a Lazy that has not run yet."""
    return Lazy()


class Scripted(Clamps):
    """Has a child that is a TorchScript program."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.conv(x))


def scripted() -> nn.Module:
    """Return a seeded Scripted."""
    return seeded(Scripted)


class InPieces(Clamps):
    """Handles its batch four items at a time, as often as for the example in a trace."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pieces = [self.conv(x[begin : begin + 4]) for begin in range(0, len(x), 4)]
        return self.tail(torch.cat(pieces))


def in_pieces() -> nn.Module:
    """Return a seeded InPieces."""
    return seeded(InPieces)


class LargeBatches(Clamps):
    """Computes something different for batches of more than four."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.tail(-x if len(x) > 4 else x)


def large_batches() -> nn.Module:
    """Return a seeded LargeBatches."""
    return seeded(LargeBatches)


class FewItems(Clamps):
    """Takes at most four items, and raises for more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 4:
            raise ValueError("too many items")
        return self.tail(self.conv(x))


def few_items() -> nn.Module:
    """Return a seeded FewItems."""
    return seeded(FewItems)


class Hungry(Clamps):
    """Requests more memory than any machine has, while a flag is set."""

    wants = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.empty(Hungry.wants)
        return self.tail(self.conv(x))


def hungry() -> nn.Module:
    """Return a seeded Hungry."""
    return seeded(Hungry)


MARK = 12345.0
"""A value that no sample has."""


class Marked(Clamps):
    """``stretch`` returns twice as many channels for an input that begins with MARK."""

    class Stretch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x], 1) if x[0, 0, 0, 0] == MARK else x

    def __init__(self) -> None:
        super().__init__()
        self.stretch = self.Stretch()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.stretch(x[:, :2])
        return super().forward(x)


def marked() -> nn.Module:
    """Return a seeded Marked."""
    return seeded(Marked)


class AddsRows(Clamps):
    """``rows`` returns items that begin with MARK twice, without branching."""

    class Rows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            marked = x[:, 0, 0, 0] == MARK
            kept = torch.cat([marked, torch.ones_like(marked)])
            return torch.cat([x, x])[kept]

    def __init__(self) -> None:
        super().__init__()
        self.rows = self.Rows()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows(x)
        return super().forward(x)


def adds_rows() -> nn.Module:
    """Return a seeded AddsRows."""
    return seeded(AddsRows)
