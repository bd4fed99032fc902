"""Tiny networks whose layers have several names, none, or the same name as another layer."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import nn

from tinynets import seeded


class TwoNames(nn.Module):
    """Has a backbone and slices of it, like a U-Net on a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.layer0 = nn.Sequential(*list(self.base.children())[:2])
        self.layer1 = self.base[2]
        self.unused = nn.Conv2d(4, 4, 1)
        self.also_unused = self.unused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer1(self.layer0(x))


class Cycle(nn.Module):
    """Its child has it as a child."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.conv.parent = self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Functions(nn.Module):
    """Functions after the last module make its result; it can't be traced symbolically."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.projection = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.isnan().any():
            raise ValueError("no image")
        return F.normalize(self.conv(x).mean((2, 3)) @ self.projection, dim=-1)


class Joiner(nn.Sequential):
    """A Sequential that returns a tuple, whose members have the names of its children."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self[0](x)
        return torch.relu(x) * 2, self[1](x)


class Joined(nn.Module):
    """DETR's combination of a backbone and its position encoding."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Joiner(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features, position = self.encoder(x)
        return self.head(features + position)


class Keyed(nn.ModuleDict):
    """A ModuleDict that returns a dict with its own keys, and scaled values."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return OrderedDict((key, 2 * head(x)) for key, head in self.items())


class Taken(nn.Module):
    """One child is called ``output``, and another like the second call of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.conv_1 = nn.Conv2d(3, 3, 1)
        self.output = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": 2 * self.output(self.conv_1(self.conv(self.conv(x))))}


class Recursive(nn.Module):
    """Calls itself on a smaller image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] <= 4:
            return self.conv(x)
        return self.conv(x) + F.interpolate(self(x[..., ::2, ::2]), x.shape[-2:])


class Attends(nn.Module):
    """A transformer layer, an attention that returns its weights, and a fused one without."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.asked = nn.MultiheadAttention(8, 2)
        self.fused = FusedAttention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        y = x.transpose(0, 1)
        return self.fused(x + self.asked(y, y, y)[0].transpose(0, 1))


class FusedAttention(nn.Module):
    """As in timm: one projection, one fused operation."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))


class OddKeys(nn.Module):
    """Children whose names contain characters that have a meaning in selections."""

    KEYS = ("a=b", "x:input", "what?", "s p", "p/q", "ünï", "[0]", "st*r", "star")

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({key: nn.Conv2d(3, 2, 1) for key in self.KEYS})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {key: head(x) for key, head in self.heads.items()}


class KeyedNet(nn.Module):
    """Holds a Keyed."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = Keyed({"a": nn.Conv2d(3, 2, 1), "b": nn.Conv2d(3, 4, 1)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads(x)["a"]


class EndsInLstm(nn.Module):
    """A Sequential returns what the LSTM at its end returns, ``(y, (h, c))``."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 5, batch_first=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


class Packs(nn.Module):
    """Returns a dict whose keys look alike: the same text, a dot, the number of a further call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> dict[Any, Any]:
        y = self.conv(self.conv(x)[:, :3])
        return {
            1: y, "1": 2 * y, "a.b": 3 * y, "a": {"b": 4 * y}, "conv": 5 * y, "conv_1": 6 * y
        }  # fmt: skip


class LookAlike(nn.Module):
    """Holds a Packs."""

    def __init__(self) -> None:
        super().__init__()
        self.pack = Packs()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.pack(x)
        return found[1] + found["1"]


def two_names() -> nn.Module:
    """Return a seeded TwoNames."""
    return seeded(TwoNames)


def cycle() -> nn.Module:
    """Return a seeded Cycle."""
    # Not by `seeded`, whose eval() follows the cycle without an end, as torch's own does.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Cycle()


def functions() -> nn.Module:
    """Return a seeded Functions."""
    return seeded(Functions)


def joined() -> nn.Module:
    """Return a seeded Joined."""
    return seeded(Joined)


def keyed() -> nn.Module:
    """Return a seeded KeyedNet."""
    return seeded(KeyedNet)


def taken() -> nn.Module:
    """Return a seeded Taken."""
    return seeded(Taken)


def recursive() -> nn.Module:
    """Return a seeded Recursive."""
    return seeded(Recursive)


def attends() -> nn.Module:
    """Return a seeded Attends."""
    return seeded(Attends)


def odd_keys() -> nn.Module:
    """Return a seeded OddKeys."""
    return seeded(OddKeys)


def ends_in_lstm() -> nn.Module:
    """Return a seeded EndsInLstm."""
    return seeded(EndsInLstm)


def look_alike() -> nn.Module:
    """Return a seeded LookAlike."""
    return seeded(LookAlike)
