"""Tiny real networks, each with one property that makes naive capturing wrong.

They are factories for ``package.module:factory`` too: servers in the tests load them by name. All
take ``[B, 3, 16, 16]`` float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

ITEM = (3, 16, 16)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a net with the same random weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        net = build()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                # Fresh statistics would make batch norm nearly the identity.
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        return net.eval()


class Block(nn.Module):
    """A residual block whose ReLU runs twice and in place, like torchvision's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Residual(nn.Module):
    """A small ResNet: in-place ReLUs, a flatten between the last two children."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Block(8), Block(8))
        self.layer2 = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), Block(16))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Containers(nn.Module):
    """A child that returns a tuple, one that returns a dict, and one that takes two tensors."""

    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, int]]:
            return x + 1, (x * 2, 3)

    class Named(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"low": x - 1, "high": x + 1}

    class Add(nn.Module):
        def forward(self, x: torch.Tensor, *, other: torch.Tensor) -> torch.Tensor:
            return x + other

    def __init__(self) -> None:
        super().__init__()
        self.pair = self.Pair()
        self.named = self.Named()
        self.add = self.Add()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, (second, _) = self.pair(x)
        named = self.named(first)
        return self.add(named["low"], other=second)


class Silent(nn.Module):
    """A head that runs in training only, and one whose weights are read without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 1)
        self.aux = nn.Conv2d(4, 2, 1)
        self.read = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        if self.training:
            return self.aux(x)
        return nn.functional.linear(x.mean((2, 3)), self.read.weight, self.read.bias)


class UnassignedInPlace(nn.Module):
    """An in-place statement whose result is unused, which dead-code elimination removes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        y.relu_()
        return self.head(y)


class Branching(nn.Module):
    """A branch on a value, which symbolic tracing refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if bool(x.isnan().any()):
            return x
        return self.second(x)


class WritesInput(nn.Module):
    """A model that overwrites its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.relu(x.sub_(0.5)))


class Dynamic(nn.Module):
    """An output whose size depends on the content, like a detector's."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Conv2d(3, 1, 1)
        self.pick = self.Pick()

    class Pick(nn.Module):
        def forward(self, scores: torch.Tensor) -> torch.Tensor:
            return scores[scores > 0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pick(self.score(x))


class Raises(nn.Module):
    """A model that raises for large values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if bool((x.abs() > 1000).any()):
            raise RuntimeError("secret internal text")
        return self.head(x)


class Numbered(nn.Module):
    """Modules whose names end in numbers, which torchvision's node names confuse."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1 = nn.BatchNorm2d(3)
        self.norm_2 = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.norm_2(self.relu(self.norm_1(x))))


class Tokens(nn.Module):
    """Patch tokens with a class token in front, like in a ViT: [B, 1 + 16, 6]."""

    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Conv2d(3, 6, 4, stride=4)
            self.token = nn.Parameter(torch.zeros(1, 1, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.proj(x).flatten(2).transpose(1, 2)
            return torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1)

    def __init__(self) -> None:
        super().__init__()
        self.embed = self.Embed()
        self.encoder = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.embed(x))


def residual() -> nn.Module:
    """Return a seeded Residual."""
    return seeded(Residual)


def block() -> nn.Module:
    """Return a seeded Block of its own."""
    return seeded(lambda: Block(3))


def containers() -> nn.Module:
    """Return a seeded Containers."""
    return seeded(Containers)


def silent() -> nn.Module:
    """Return a seeded Silent."""
    return seeded(Silent)


def unassigned_in_place() -> nn.Module:
    """Return a seeded UnassignedInPlace."""
    return seeded(UnassignedInPlace)


def branching() -> nn.Module:
    """Return a seeded Branching."""
    return seeded(Branching)


def writes_input() -> nn.Module:
    """Return a seeded WritesInput."""
    return seeded(WritesInput)


def dynamic() -> nn.Module:
    """Return a seeded Dynamic."""
    return seeded(Dynamic)


def raises() -> nn.Module:
    """Return a seeded Raises."""
    return seeded(Raises)


def numbered() -> nn.Module:
    """Return a seeded Numbered."""
    return seeded(Numbered)


def tokens() -> nn.Module:
    """Return a seeded Tokens."""
    return seeded(Tokens)


class Asserts(nn.Module):
    """Checks each value before its next step, with what a symbolic trace keeps: as ViTs do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._assert(x.dim() == 4, "first is no batch of images")
        x = self.second(x)
        torch._assert(x.dim() == 4, "second is no batch of images")
        return x


def asserts() -> nn.Module:
    """Return a net that asserts."""
    return seeded(Asserts)


class BakesBatch(nn.Module):
    """A Python number computed from the batch size, which a trace keeps as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.tail = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        items = [self.conv(x[index : index + 1]) for index in range(len(x))]
        return self.tail(torch.cat(items))


class ReturnsView(nn.Module):
    """A child whose output is a view of memory that is overwritten later."""

    class View(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :2].transpose(2, 3)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.view = self.View()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        part = self.view(x)
        x.zero_()
        return part + 1


def training() -> nn.Module:
    """Return the Residual in training mode, as careless authors do."""
    return residual().train()


def bakes_batch() -> nn.Module:
    """Return a seeded BakesBatch."""
    return seeded(BakesBatch)


def returns_view() -> nn.Module:
    """Return a seeded ReturnsView."""
    return seeded(ReturnsView)


class NotFinite(nn.Module):
    """A child that takes the logarithm of possibly negative values, one in a wrapper before it."""

    class Log(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(x)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.inner = nn.Sequential(self.Log())
        self.tail = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.inner(self.conv(x) - 10))


class TwoInputs(nn.Module):
    """A net whose forward needs two tensors."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x * mask


class ReturnsText(nn.Module):
    """A net that returns no tensor, from a child that returns none either."""

    class Label(nn.Module):
        def forward(self, x: torch.Tensor) -> str:
            return "cat" if x.mean() > 0 else "dog"

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.label = self.Label()

    def forward(self, x: torch.Tensor) -> str:
        return self.label(self.conv(x))


class Patches(nn.Module):
    """A small ViT for any size: patches of 4, a class token and two registers in front."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 4, stride=4)
        self.front = nn.Parameter(torch.zeros(1, 3, 6))
        self.tokens = nn.Identity()
        self.bare = nn.Identity()
        self.last = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = self.patch(x)
        self.last(grid.permute(0, 2, 3, 1))
        bare = self.bare(grid.flatten(2).transpose(1, 2))
        return self.tokens(torch.cat([self.front.expand(len(x), -1, -1), bare], 1))


def not_finite() -> nn.Module:
    """Return a seeded NotFinite."""
    return seeded(NotFinite)


def two_inputs() -> nn.Module:
    """Return a TwoInputs."""
    return seeded(TwoInputs)


def returns_text() -> nn.Module:
    """Return a seeded ReturnsText."""
    return seeded(ReturnsText)


def patches() -> nn.Module:
    """Return a seeded Patches."""
    return seeded(Patches)


class Chain(nn.Module):
    """As few layers as will do. Loading takes a quarter of the Residual's time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.layer1 = nn.Conv2d(8, 8, 3, padding=1)
        self.layer2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer2(self.layer1(self.conv1(x))).mean((2, 3))


def chain() -> nn.Module:
    """Return a seeded Chain."""
    return seeded(Chain)


class Lone(nn.Module):
    """One layer: torch.compile translates every module again for each way of hooking it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer1(x).relu()


def lone() -> nn.Module:
    """Return a seeded Lone."""
    return seeded(Lone)


def compiled() -> nn.Module:
    """Return the Lone as ``torch.compile`` wraps it."""
    return torch.compile(lone(), backend="eager")


class Heavy(nn.Module):
    """12 MB of weights with little work, so that a leak of the weights is visible."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(768, 4096)
        self.narrow = nn.Linear(4096, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.wide(x.flatten(1)).relu_())


def heavy() -> nn.Module:
    """Return a seeded Heavy."""
    return seeded(Heavy)


def double() -> nn.Module:
    """Return the Residual in float64."""
    return residual().double()


class KeepsState(nn.Module):
    """A child that stores its input on itself, for another to read later."""

    class Keeper(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = x.mean((1, 2, 3), keepdim=True)
            return x

    def __init__(self) -> None:
        super().__init__()
        self.keeper = self.Keeper()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.tail = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(self.keeper(x))
        time.sleep(0.002)
        return self.tail(y + self.keeper.seen)


def keeps_state() -> nn.Module:
    """Return a seeded KeepsState."""
    return seeded(KeepsState)


class AddsPositions(nn.Module):
    """A small MViT: a submodule that adds in place to what it returns, and to its argument."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.rand(16, 1))
            self.columns = nn.Parameter(torch.rand(1, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.cat((x, x), dim=1)
            grid = torch.repeat_interleave(self.rows, 16, dim=1)
            grid.add_(self.columns)
            x.add_(grid)
            return x

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 1)
        self.positions = self.Positions()
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.positions(self.stem(x)) * 2)


def adds_positions() -> nn.Module:
    """Return a seeded AddsPositions."""
    return seeded(AddsPositions)
