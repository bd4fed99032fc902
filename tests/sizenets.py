"""Nets whose activations follow the sizes of their inputs in different ways."""

from __future__ import annotations

import torch
from torch import nn

from tinynets import seeded


class Convolutions(nn.Module):
    """Convolutions and pooling with and without padding, rounded down and up."""

    def __init__(self) -> None:
        super().__init__()
        self.padded = nn.Conv2d(3, 4, 3, 2, 1)
        self.pooled = nn.MaxPool2d(3, 2, 1)
        self.bare = nn.Conv2d(4, 4, 5, 3)
        self.up = nn.ConvTranspose2d(4, 4, 3, 2)
        self.fixed = nn.AdaptiveAvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fixed(self.up(self.bare(self.pooled(self.padded(x)))))


class UNet(nn.Module):
    """What went down must fit what comes up, so it takes multiples of 8.

    Args:
        padding: Of the convolutions; with a padding of 1, each size before a multiple fits too.
    """

    def __init__(self, padding: int = 0) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            nn.Conv2d(4 if i else 3, 4, 2 + padding, 2, padding) for i in range(3)
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(4, 4, 2, 2) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
        skips.pop()
        for layer in self.up:
            x = layer(x)
            x = x + skips.pop() if skips else x
        return x


class Patches(nn.Module):
    """A ViT of any size: patches of 8, a class token, interpolated positions, one block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.places = nn.Parameter(torch.randn(1, 8, 4, 4))
        self.tokens = nn.Identity()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + nn.functional.interpolate(self.places, x.shape[-2:], mode="bilinear")
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = self.tokens(x)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(x[:, 0])


class Encoder(nn.Module):
    """Token ids, positions for up to 64 of them, one transformer layer, a pooled result."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.places = nn.Parameter(torch.randn(64, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.flat = nn.Identity()
        self.pooled = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.layer(self.embed(ids) + self.places[: ids.shape[1]])
        self.flat(x.flatten(1))
        return self.pooled(x.mean(1))


class Windows(nn.Module):
    """Windows of 4 × 4 in the batch's dimension, of an image that is padded to whole ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.inside = nn.Linear(8, 8)
        self.out = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        size, height, width, channels = x.shape
        x = nn.functional.pad(x, (0, 0, 0, -width % 4, 0, -height % 4))
        rows, columns = x.shape[1] // 4, x.shape[2] // 4
        x = x.view(size, rows, 4, columns, 4, channels).transpose(2, 3)
        x = self.inside(x.reshape(-1, 16, channels))
        x = x.view(size, rows, columns, 4, 4, channels).transpose(2, 3)
        return self.out(x.reshape(size, 4 * rows, 4 * columns, channels)[:, :height, :width])


class Cells(nn.Module):
    """A cell that runs once for each element of a series: its calls are as many as its length."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(6, 8)
        self.out = nn.Identity()

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        state = series.new_zeros(len(series), 8)
        states = []
        for step in series.unbind(1):
            state = self.cell(step, state)
            states.append(state)
        return self.out(torch.stack(states, 1))


class Clipped(nn.Module):
    """Reads the first 40 elements of a waveform at most, and only those above 100 in pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Identity()
        self.pairs = nn.Identity()

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        self.first(wave[:, :40])
        return self.pairs(wave if wave.shape[1] <= 100 else wave[:, ::2].contiguous())


class Writes(nn.Module):
    """Keeps the last wave of more than 700 samples, and adds it to the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Identity()
        self.kept: torch.Tensor | None = None

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        x = self.first(wave if self.kept is None else wave + self.kept.mean())
        if wave.shape[1] > 700:
            self.kept = wave.clone()
        return x


class Thinned(nn.Module):
    """Reads every other sample of a wave of more than 700."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Identity()

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        return self.first(wave if wave.shape[1] <= 700 else wave[:, ::2].contiguous())


class ShortOnly(nn.Module):
    """Takes series of up to 120 elements, and says so only after its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        x = self.first(series)
        if series.shape[1] > 120:
            raise ValueError(f"at most 120 elements, got {series.shape[1]}")
        return self.second(x)


def convolutions() -> nn.Module:
    """Return seeded Convolutions."""
    return seeded(Convolutions)


def unet() -> nn.Module:
    """Return a seeded UNet."""
    return seeded(UNet)


def rounding_unet() -> nn.Module:
    """Return a seeded UNet that takes sizes before multiples of 8 as well."""
    return seeded(lambda: UNet(1))


def patches() -> nn.Module:
    """Return seeded Patches."""
    return seeded(Patches)


def encoder() -> nn.Module:
    """Return a seeded Encoder."""
    return seeded(Encoder)


def windows() -> nn.Module:
    """Return seeded Windows."""
    return seeded(Windows)


def cells() -> nn.Module:
    """Return seeded Cells."""
    return seeded(Cells)


def clipped() -> nn.Module:
    """Return a Clipped."""
    return seeded(Clipped)


def writes() -> nn.Module:
    """Return a Writes."""
    return seeded(Writes)


def thinned() -> nn.Module:
    """Return a Thinned."""
    return seeded(Thinned)


def short_only() -> nn.Module:
    """Return a seeded ShortOnly."""
    return seeded(ShortOnly)


class Follows(nn.Module):
    """Token ids whose positions are cut to their length, and a mean: a trace follows the length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.places = nn.Parameter(torch.randn(256, 8))
        self.out = nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.embed(ids) + self.places[: ids.shape[1]])


class BakedHalf(nn.Module):
    """Mean of the first half of a wave: a trace holds the half, and is wrong without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(1, 4)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        half = int(wave.shape[1]) // 2
        return self.out(wave[:, :half].mean(1, keepdim=True))


class BakedView(nn.Module):
    """Rows of a wave as a matrix: a trace holds its width, and fails at any other."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Identity()

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        return self.out(wave.view(-1, 2, int(wave.shape[1]) // 2).sum(1))


class BakedBias(nn.Module):
    """Attention with a bias for the distance of two positions, as T5 and Swin have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.bias = nn.Embedding(9, 1)
        self.out = nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        at = torch.arange(int(ids.shape[1]), device=ids.device)
        distance = (at[None, :] - at[:, None]).clamp(-4, 4) + 4
        scores = x @ x.transpose(1, 2) + self.bias(distance)[..., 0]
        return self.out(scores.softmax(-1) @ x)


class BakedScale(nn.Module):
    """A mean over what was resized to a fixed share of the image: its size is held by a trace."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.out = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        size = (int(x.shape[2]) // 2, int(x.shape[3]) // 2)
        return self.out(nn.functional.interpolate(x, size).mean((2, 3)))


class LooksWhenLong(nn.Module):
    """Clamps waves of more than 100 samples, as values are large: the first pass shows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Identity()

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        if wave.shape[1] > 100 and bool(wave.abs().max() > 1e6):
            wave = wave.clamp(-1, 1)
        return self.out(wave * 2)


def follows() -> nn.Module:
    """Return seeded Follows."""
    return seeded(Follows)


def baked_half() -> nn.Module:
    """Return a seeded BakedHalf."""
    return seeded(BakedHalf)


def baked_view() -> nn.Module:
    """Return a BakedView."""
    return seeded(BakedView)


def baked_bias() -> nn.Module:
    """Return a seeded BakedBias."""
    return seeded(BakedBias)


def baked_scale() -> nn.Module:
    """Return a seeded BakedScale."""
    return seeded(BakedScale)


def looks_when_long() -> nn.Module:
    """Return a LooksWhenLong."""
    return seeded(LooksWhenLong)


class Translation(nn.Module):
    """Two sequences of ids of lengths of their own: each alone, one against the other, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.read = nn.Identity()
        self.written = nn.Identity()
        self.scores = nn.Identity()
        self.both = nn.Identity()

    def forward(self, input_ids: torch.Tensor, decoder_ids: torch.Tensor) -> torch.Tensor:
        read, written = self.read(self.embed(input_ids)), self.written(self.embed(decoder_ids))
        self.both(torch.cat([read, written], 1))
        return self.scores(written @ read.transpose(1, 2))


def translation() -> nn.Module:
    """Return a seeded Translation."""
    return seeded(Translation)
