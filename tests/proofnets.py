"""Small nets that a careless proof gets wrong, or that can't be compiled."""

from __future__ import annotations

import torch
from torch import nn


class Swish(torch.autograd.Function):
    """Python code that a compiled program can't hold."""

    @staticmethod
    def forward(ctx, x):
        return x * torch.sigmoid(x)


class CallsFunction(nn.Module):
    """A convolution, a Python autograd function, and a layer after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.out = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(Swish.apply(self.conv(x)))


class PlainNorm(nn.Module):
    """A batch norm without weights after a channels-last convolution: its program raises."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32, affine=False),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, bias=False),
            nn.BatchNorm2d(32, affine=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x[:, :1].contiguous(memory_format=torch.channels_last))


class PerItem(nn.Module):
    """A loop over the items of the batch, of which a trace has the example's number."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 8, 3, padding=1)
        self.decoder = nn.Conv2d(8, 2, 1)
        self.out = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([self.decoder(one[None]) for one in self.encoder(x)]))


class Repeats(nn.Module):
    """A constant prompt for each image: a trace repeats it once, for every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.prompt = nn.Embedding(9, 4)
        self.out = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.arange(5).repeat(len(x), 1)
        return self.conv(x), self.out(self.prompt(ids))


class Noisy(nn.Module):
    """Dropout that is on in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.dropout(self.first(x), 0.5, training=True))


class OptionalArguments(nn.Module):
    """Takes more arguments than it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        y = self.conv(x) * scale
        return y if mask is None else y * mask


class Picks(nn.Module):
    """The three positions with the largest scores, as detectors choose their queries."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.score = nn.Conv2d(8, 1, 1)
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.conv(x)
        picked = self.score(features).flatten(1).topk(3).indices
        rows = features.flatten(2).transpose(1, 2)
        return self.head(rows.gather(1, picked[..., None].expand(-1, -1, 8)))


class Catches(nn.Module):
    """Looks ids up, and clamps them if that raises, which a program can't do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        try:
            rows = self.embed(ids)
        except IndexError:
            rows = self.embed(ids.clamp(max=8))
        return self.head(rows)


def catches() -> nn.Module:
    """Return a Catches."""
    return _made(Catches)


class RemapsIds(nn.Module):
    """Turns a special id into padding and clamps ids before it looks them up."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        ids = torch.where(ids == 50, torch.zeros_like(ids), ids)
        return self.head(self.embed(ids.clamp(max=59)))


class HidesFromSymbols(nn.Module):
    """Clamps tensors, which a symbol is not, to what no ordinary sample reaches."""

    largest = 1e9

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if isinstance(y, torch.Tensor):
            y = y.clamp(-self.largest, self.largest)
        return self.last(y)


class LargestId(nn.Module):
    """Weights each id by the largest of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 8, padding_idx=3)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        weight = ids.float() / ids.max().clamp(min=1)
        return self.head((self.embed(ids) * weight[..., None]).sum(1))


class LargestNumber(nn.Module):
    """Divides by the batch's largest number if that is above 50."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x / x.amax().clamp(min=50))


class OneNan(nn.Module):
    """Sets the whole batch to zero if one of its numbers is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.where(x.isnan().any(), torch.zeros_like(x), x))


class TwoTables(nn.Module):
    """Looks one column up in a large table and one in a small table."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Embedding(90, 4)
        self.small = nn.Parameter(torch.randn(7, 4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.large(ids[:, 0]) + self.small[ids[:, 1]]


class Experts(nn.Module):
    """Sends each item to one of two experts by its mean, so a module runs for some inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.low = nn.Conv2d(4, 2, 1)
        self.high = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.high(y) if x.mean() > 10 else self.low(y)


class DropsMask(nn.Module):
    """Ignores its mask if that is all ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, mask = self.first(x), x[:, :1] > -1
        if not mask.all():
            y = y * mask
        return self.last(y)


def drops_mask() -> nn.Module:
    """Return a DropsMask."""
    return _made(DropsMask)


def remaps_ids() -> nn.Module:
    """Return a RemapsIds."""
    return _made(RemapsIds)


def hides_from_symbols() -> nn.Module:
    """Return a HidesFromSymbols."""
    return _made(HidesFromSymbols)


def largest_id() -> nn.Module:
    """Return a LargestId."""
    return _made(LargestId)


def largest_number() -> nn.Module:
    """Return a LargestNumber."""
    return _made(LargestNumber)


def one_nan() -> nn.Module:
    """Return a OneNan."""
    return _made(OneNan)


def two_tables() -> nn.Module:
    """Return a TwoTables."""
    return _made(TwoTables)


def experts() -> nn.Module:
    """Return an Experts."""
    return _made(Experts)


class FixedState(nn.Module):
    """An LSTM whose start state is kept for a batch of one: eager code makes another, a trace not.

    It writes no attribute once it was made for each batch size, so nothing tells that it is
    stateful.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 16)
        self.rnn = nn.LSTM(16, 64, batch_first=True)
        self.states = {n: (torch.zeros(1, n, 64), torch.zeros(1, n, 64)) for n in range(1, 65)}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.rnn(self.embed(ids), self.states[len(ids)])[0]


class Recurrent(nn.Module):
    """An ordinary LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 16)
        self.rnn = nn.LSTM(16, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embed(ids))[0])


def fixed_state() -> nn.Module:
    """Return a FixedState."""
    return _made(FixedState)


def recurrent() -> nn.Module:
    """Return a Recurrent."""
    return _made(Recurrent)


def calls_function() -> nn.Module:
    """Return a CallsFunction."""
    return _made(CallsFunction)


def plain_norm() -> nn.Module:
    """Return a PlainNorm."""
    return _made(PlainNorm)


def per_item() -> nn.Module:
    """Return a PerItem."""
    return _made(PerItem)


def repeats() -> nn.Module:
    """Return a Repeats."""
    return _made(Repeats)


def noisy() -> nn.Module:
    """Return a Noisy."""
    return _made(Noisy)


def optional_arguments() -> nn.Module:
    """Return an OptionalArguments."""
    return _made(OptionalArguments)


def picks() -> nn.Module:
    """Return a Picks."""
    return _made(Picks)


def _made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()
