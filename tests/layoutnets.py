"""Nets with layouts that sizes alone show wrongly, or not at all."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer


class Mixer(nn.Module):
    """Mixes tokens as ``[B, 64, 16]``: 64 channels (which is 8 × 8 too) of 4 × 4 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 4, 4)
        self.mlp_tokens = nn.Sequential(nn.Linear(16, 16), nn.GELU())
        self.norm = nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2)
        return self.norm((x + self.mlp_tokens(x)).transpose(1, 2))


class Vit(nn.Module):
    """Takes 16 × 24 pixels only: a class token, 4 × 6 patches, one attention block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, 25, 16))
        self.embedded = nn.Identity()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1) + self.places
        x = self.embedded(x)
        return self.out(x + self.attention(x, x, x)[0])


def small_swin() -> nn.Module:
    """Return torchvision's Swin with two short stages.

    Channels are last. At 64 × 64 pixels the second stage is one window, which is not shifted. Its
    attention is made strong, so that a window in the wrong place is seen in the values.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        net = SwinTransformer([4, 4], 24, [2, 2], [2, 4], [8, 8], num_classes=10)
    for name, parameter in net.named_parameters():
        if ".attn." in name:
            parameter.data.mul_(20)
    return net.eval()


def small_vit() -> nn.Module:
    """Return torchvision's ViT with three blocks, for 64 × 64 pixels."""
    return VisionTransformer(64, 32, 3, 4, 32, 64, num_classes=10).eval()


class Queries(nn.Module):
    """Sixteen learnt queries, as many as in a 4 × 4 grid, for any image size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.queries = nn.Parameter(torch.randn(16, 8))
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.queries + self.stem(x).mean((2, 3))[:, None])


class BatchSecond(nn.Module):
    """Tokens as ``[L, B, D]``, and folded into one dimension both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.second = nn.Identity()
        self.interleaved = nn.Identity()
        self.apart = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.second(self.stem(x).flatten(2).permute(2, 0, 1))
        self.interleaved(tokens.flatten(0, 1))
        return self.apart(tokens.transpose(0, 1).flatten(0, 1))


class Series(nn.Module):
    """A series ``[B, 6, T]`` of any length, with channels first and last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(6, 4, 3, 2)
        self.last = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).transpose(1, 2))


class Text(nn.Module):
    """Takes twelve token ids; returns positions and the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.places = nn.Parameter(torch.randn(12, 12))
        self.out = nn.LayerNorm(12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.places
        return self.out(x + x.mean(1, keepdim=True))


class Pools(nn.Module):
    """A 4 × 4 grid for images of every size, then one position."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grid = nn.AdaptiveAvgPool2d(4)
        self.one = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(self.grid(self.stem(x)))


class Video(nn.Module):
    """Clips ``[B, 3, T, H, W]``: channels first, channels last, and tokens of all frames."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4))
        self.last = nn.LayerNorm(8)
        self.tokens = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.last(self.stem(x).movedim(1, -1))
        return self.tokens(x.flatten(1, 3))


def _maker(kind: type[nn.Module]):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return kind()

    return make


mixer = _maker(Mixer)
vit = _maker(Vit)
queries = _maker(Queries)
batch_second = _maker(BatchSecond)
series = _maker(Series)
text = _maker(Text)
pools = _maker(Pools)
video = _maker(Video)
