"""Small nets whose limits only a trial compilation or run shows."""

from __future__ import annotations

from contextvars import ContextVar

import torch
from torch import nn

import proofnets
from layertap.silence import warnings_ignored

_depth: ContextVar[int] = ContextVar("claimnets_depth", default=0)


class Forked(nn.Module):
    """One layer runs in its own task, from which a trace can't take a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.forked = nn.Conv2d(4, 4, 1)
        self.middle = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with warnings_ignored():  # It is deprecated.
            y = torch.jit.wait(torch.jit.fork(self.forked, self.first(x)))
        return self.last(self.middle(y))


class ForkedSometimes(Forked):
    """The layer runs in its own task only for large numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.max() > 10:
            return super().forward(x)
        return self.last(self.middle(self.forked(self.first(x))))


class Repeats(nn.Module):
    """A constant prompt for each item: a trace repeats it once, for every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.prompt = nn.Embedding(9, 4)
        self.pooled = nn.Identity()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.arange(5).repeat(len(x), 1)
        return self.conv(x), self.pooled(self.prompt(ids).mean(1))


class OneOrMany(nn.Module):
    """Treats one item as a special case, as the decoders of transformers do without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.placed = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        places = torch.arange(y.shape[-1]).unsqueeze(0)
        if y.shape[0] != places.shape[0]:
            places = places.expand(y.shape[0], -1)
        rows = torch.arange(y.shape[0])
        return self.placed(y * places[rows][:, None, None])


class ConstantItems(nn.Module):
    """The number of items is a constant of a program, which is broadcast if it is one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.placed = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        places = torch.arange(y.shape[-1]).repeat(len(y), 1)
        return self.placed(y * places[:, None, None])


class ConstantItemsSometimes(ConstantItems):
    """The number of items is such a constant only for large numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.max() > 1 else self.placed(self.conv(x))


class LargeMean(nn.Module):
    """Divides by the number of items, a constant in a trace, in a layer with many elements."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 1)
        self.shared = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(self.conv(x) / len(x))


class ClampsBelow(nn.Module):
    """A clamp with only an upper bound, on which torch's optimisation fails."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).clamp(max=100))


class DeadClamp(nn.Module):
    """Clamps its input in place, in a statement whose result is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.clamp_(-10, 10)
        return self.last(self.first(x))


class DeadChain(DeadClamp):
    """Halves its input in place before it clamps it, at a magnitude that no sample reaches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(0.5).clamp_(-1e9, 1e9)
        return self.last(self.first(x))


class OwnCall(nn.Module):
    """Clamps its input in ``__call__``, at a magnitude that no sample reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x.clamp(-1e5, 1e5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


class OwnHook(nn.Module):
    """Clamps its input in a hook on itself, at a magnitude that no sample reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.register_forward_pre_hook(lambda _, args: (args[0].clamp(-1e5, 1e5),))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


class Clips(proofnets.HidesFromSymbols):
    """Only bytes are large enough to be clipped, by a function that a symbolic trace misses."""

    largest = 20.0


class SometimesTuple(nn.Module):
    """A layer that returns a tuple for negative means only."""

    class Maybe(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
            return x if x.nan_to_num().mean() > 0 else (x, x)

    def __init__(self) -> None:
        super().__init__()
        self.maybe = self.Maybe()
        self.last = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.maybe(x)
        return self.last(y if isinstance(y, torch.Tensor) else y[0])


class Depth(nn.Module):
    """Multiplies by a ContextVar that counts the passes that have not ended."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _depth.set(_depth.get() + 1)
        y = self.last(self.first(x) * _depth.get())
        _depth.set(_depth.get() - 1)
        return y


class Patches(nn.Module):
    """Replaces a function of torch while it runs, and restores it unless the pass ends early."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, nn.functional.relu = nn.functional.relu, nn.functional.gelu
        y = self.last(nn.functional.relu(self.first(x)))
        nn.functional.relu = before
        return y


class Packs(nn.Module):
    """An encoder that packs padded tokens (id 0) into a nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.embed(ids), src_key_padding_mask=ids == 0)


class HalfFirst(nn.Module):
    """Converts its input to the bfloat16 of its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1).bfloat16()
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x.bfloat16()).float())


def all_half() -> nn.Module:
    """Return a net that takes bfloat16 only."""
    return nn.Conv2d(3, 4, 1).bfloat16()


def made(kind: type[nn.Module]) -> nn.Module:
    """Return a seeded instance."""
    torch.manual_seed(0)
    return kind()


def forked() -> nn.Module:
    """Return a Forked."""
    return made(Forked)


def forked_sometimes() -> nn.Module:
    """Return a ForkedSometimes."""
    return made(ForkedSometimes)


def repeats() -> nn.Module:
    """Return a Repeats."""
    return made(Repeats)


def one_or_many() -> nn.Module:
    """Return a OneOrMany."""
    return made(OneOrMany)


def constant_items() -> nn.Module:
    """Return a ConstantItems."""
    return made(ConstantItems)


def constant_items_sometimes() -> nn.Module:
    """Return a ConstantItemsSometimes."""
    return made(ConstantItemsSometimes)


def large_mean() -> nn.Module:
    """Return a LargeMean."""
    return made(LargeMean)


def clamps_below() -> nn.Module:
    """Return a ClampsBelow."""
    return made(ClampsBelow)


def dead_clamp() -> nn.Module:
    """Return a DeadClamp."""
    return made(DeadClamp)


def dead_chain() -> nn.Module:
    """Return a DeadChain."""
    return made(DeadChain)


def own_call() -> nn.Module:
    """Return an OwnCall."""
    return made(OwnCall)


def own_hook() -> nn.Module:
    """Return an OwnHook."""
    return made(OwnHook)


def clips() -> nn.Module:
    """Return a Clips."""
    return made(Clips)


def sometimes_tuple() -> nn.Module:
    """Return a SometimesTuple."""
    return made(SometimesTuple)


def depth() -> nn.Module:
    """Return a Depth."""
    return made(Depth)


def patches() -> nn.Module:
    """Return a Patches."""
    return made(Patches)


def packs() -> nn.Module:
    """Return a Packs."""
    return made(Packs)


def half_first() -> nn.Module:
    """Return a HalfFirst."""
    return made(HalfFirst)
