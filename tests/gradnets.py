"""Tiny float64 networks whose gradients are easy to get wrong. Images are [B, 3, 8, 8]."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from tinynets import seeded

IMAGE = (3, 8, 8)
TOKENS = (6,)


class Residual(nn.Module):
    """Has in-place ReLUs after everything, one of them called three times, and adds in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        identity = self.shortcut(x)
        x = self.conv2(x)
        x = self.relu(x)
        if self.relu.inplace:
            # In plain PyTorch such a model has no gradients: its ReLU keeps what this overwrites.
            x += identity
        else:
            x = x + identity
        x = self.relu(x)
        return self.fc(self.pool(x).flatten(1))


def residual() -> nn.Module:
    """Return a seeded Residual."""
    return seeded(Residual).double()


class Pair(NamedTuple):
    """What ``Splits`` passes on."""

    low: torch.Tensor
    high: torch.Tensor


class Split(nn.Module):
    """Returns a named tuple."""

    def forward(self, x: torch.Tensor) -> Pair:
        return Pair(*x.chunk(2, dim=1))


class Named(nn.Module):
    """Takes a named argument, and returns a dict with a list in it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2, 2, 1)

    def forward(
        self, pair: Pair, *, scale: torch.Tensor
    ) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        low = self.mix(pair.low).relu_()
        return {"sum": low + pair.high, "parts": [low * scale, pair.high]}


class Splits(nn.Module):
    """Passes tuples, dicts and lists between its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.split = Split()
        self.named = Named()
        self.fc = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        pair = self.split(self.conv(x).tanh())
        found = self.named(pair, scale=pair.low.mean((1, 2, 3), keepdim=True))
        mixed = found["sum"] + found["parts"][0] * found["parts"][1]
        return {"scores": self.fc(mixed.mean((2, 3))), "mixed": mixed}


def splits() -> nn.Module:
    """Return a seeded Splits."""
    return seeded(Splits).double()


class Tokens(nn.Module):
    """Embeds token ids and attends; [B, 6] int64 to [B, 6, 11]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.1, batch_first=True, activation="gelu"
        )
        self.head = nn.Linear(8, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(ids)))


def tokens() -> nn.Module:
    """Return a seeded Tokens."""
    return seeded(Tokens).double()


class BatchSecond(nn.Module):
    """Works on [L, B, C], with an LSTM, and returns one number per item."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(24, 5)
        self.head = nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2).flatten(2).transpose(0, 1)
        return self.head(self.lstm(x)[0])[-1, :, 0]


def batch_second() -> nn.Module:
    """Return a seeded BatchSecond."""
    return seeded(BatchSecond).double()


class Coupled(nn.Module):
    """Multiplies by the mean of the batch, so that the items influence each other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.Tanh()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv(x))
        return self.fc((x * x.mean(0)).mean((2, 3)))


def coupled() -> nn.Module:
    """Return a seeded Coupled."""
    return seeded(Coupled).double()


class Ignores(nn.Module):
    """Relies on what an in-place module does to its argument, and ignores what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        self.relu(x)
        return self.fc(x.mean((2, 3)))


def ignores() -> nn.Module:
    """Return a seeded Ignores."""
    return seeded(Ignores).double()


class Branches(nn.Module):
    """Has a branch that its scores don't depend on, and one that runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 4, 1)
        self.side = nn.Conv2d(4, 2, 1)
        self.frozen = nn.Conv2d(4, 2, 1)
        self.fc = nn.Linear(4, 3)
        self.late = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.trunk(x)
        side = self.side(x)
        with torch.no_grad():
            frozen = self.frozen(x)
        scores = self.fc(x.mean((2, 3)))
        return scores, self.late(scores), side, frozen, x.argmax(1)


def branches() -> nn.Module:
    """Return a seeded Branches."""
    return seeded(Branches).double()


IMAGE_NETS: tuple[Callable[[], nn.Module], ...] = (residual, splits, batch_second)


def tiny_vit() -> nn.Module:
    """Return a vision transformer of torchvision with two small layers, in float32."""
    from torchvision.models import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        net = VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=7)
        # torchvision begins with a head of zeros, for which every gradient is zero.
        nn.init.normal_(net.heads[0].weight)
        return net.eval()


class NormThenTokens(nn.Module):
    """Has norms whose gradient, for one item, fits two memory layouts; float64."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = norm(16)
        self.later = nn.LayerNorm(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = self.norm(self.conv(x).tanh()).permute(2, 3, 0, 1).contiguous()
        return self.head(self.later(places) ** 3).mean((0, 1))


def _settled_norm(norm: nn.Module) -> nn.Module:
    for name, buffer in norm.named_buffers():
        if name == "running_var":
            nn.init.uniform_(buffer, 0.5, 2.0)
    return norm


def batch_norm_then_tokens() -> nn.Module:
    """Return a seeded net with a batch norm."""
    return seeded(lambda: NormThenTokens(lambda c: _settled_norm(nn.BatchNorm2d(c)))).double()


def instance_norm_then_tokens() -> nn.Module:
    """Return a seeded net with an instance norm."""
    return seeded(lambda: NormThenTokens(lambda c: nn.InstanceNorm2d(c, affine=True))).double()


class Last(nn.Module):
    """Works on [B, H, W, C], as Swin does."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.cut = nn.Conv2d(channels, 6, 2, 2)
        self.mix = nn.Linear(6, 6)
        self.act = nn.GELU()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.mix(self.cut(x).movedim(1, -1)))
        return self.fc(x.mean((1, 2)))


def last() -> nn.Module:
    """Return a seeded Last, in float32."""
    return seeded(Last)


def last_without_images() -> nn.Module:
    """Return a seeded Last for inputs of five channels, which are no images."""
    return seeded(lambda: Last(5))


class Smooth(nn.Module):
    """Has no kinks, so that numerical integration converges fast."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.Tanh()
        self.more = nn.Conv2d(4, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.more(self.act(self.conv(x))))
        return self.fc((x * x).mean((2, 3)))


def smooth() -> nn.Module:
    """Return a seeded Smooth."""
    return seeded(Smooth).double()


class Clears(nn.Module):
    """Overwrites a value after its last use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.same = nn.Identity()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        scores = self.fc(self.same(x).tanh().mean((2, 3)))
        x.zero_()
        return scores


def clears() -> nn.Module:
    """Return a seeded Clears."""
    return seeded(Clears).double()
