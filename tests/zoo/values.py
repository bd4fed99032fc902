"""Models whose arithmetic is awkward: extremes, ties, rounding, precision, chance."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from zoo.remembering import Pair
from zoo.specimen import finite, floats, specimen

ITEM = (3, 8, 8)


def near_ties(item: tuple[int, ...]) -> list[torch.Tensor]:
    """Return batches in which many elements are equal, or differ in their last bits only."""
    generator = torch.Generator().manual_seed(5)
    few = torch.randint(0, 3, (2, *item), generator=generator).float()
    noise = 1 + torch.randn((2, *item), generator=generator) * 1e-7
    columns = torch.randn((2, *item[:-1], 1), generator=generator).expand(2, *item).contiguous()
    return [few, 0.5 * noise, columns, columns * noise, *floats(item)[3:7]]


@specimen("NaN is replaced before the first child, as in tabular models")
class ReplacesNan(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x.nan_to_num(0, 1, -1)))


@specimen("NaN marks what is missing, and means leave it out (nanmean)")
class NanMeans(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x - x.nanmean((2, 3), keepdim=True).nan_to_num()))


@specimen("Values are clamped at 10 in front, which samples below never show")
class ClampsAtTen(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(-10, 10))


@specimen("Values are clamped at 100 between two children")
class ClampsAtHundred(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).clamp(-100, 100))


@specimen("Values over 1e4 overflow to infinity in a half-precision child", requests=[
    *floats(ITEM)[:4], floats(ITEM)[0] * 1e5, *floats(ITEM)[4:7],
])  # fmt: skip
class HalfInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 8)
        self.narrow = nn.Linear(4, 4).half()
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).flatten(1)
        return self.last(self.narrow(y.half()).float())


@specimen("Autocast to bfloat16 is switched on inside forward")
class AutocastInside(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.first(x)
        return self.second(y.float())


@specimen("A layer returns bfloat16, and the next one float64")
class ManyTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.brain = nn.Conv2d(3, 4, 8).bfloat16()
        self.wide = nn.Linear(4, 4).double()
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.brain(x.bfloat16()).flatten(1)
        return self.out(self.wide(y.double()).float())


class Casts(nn.Module):
    """Casts to a type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype)


@specimen("Layers return float8, uint8, int8, int64 and bool", requests=finite(ITEM))
class OddTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8)
        self.eight = Casts(torch.float8_e4m3fn)
        self.byte = Casts(torch.uint8)
        self.small = Casts(torch.int8)
        self.long = Casts(torch.int64)
        self.flag = Casts(torch.bool)
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).flatten(1).clamp(-100, 100)
        total = self.eight(y).float()
        for cast in (self.small, self.long):
            total = total + cast(y).float()
        return self.out(total + self.byte(y.abs()).float() * self.flag(y.round()).float())


@specimen("The spectrum is complex between the layers, as in FNet and in audio models")
class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.spectrum = nn.Identity()
        self.weight = nn.Parameter(torch.randn(4, 8, 5, dtype=torch.complex64))
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.spectrum(torch.fft.rfft2(self.first(x)) * self.weight)
        return self.last(torch.fft.irfft2(z, s=(8, 8)))


@specimen("Conjugates and imaginary parts are views whose sign is applied when they are read")
class LazySigns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.conjugate = nn.Identity()
        self.imaginary = nn.Identity()
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.conjugate(torch.fft.fft2(self.first(x)).conj())
        return self.last(self.imaginary(z.imag))


@specimen(
    "The best patches are taken by topk, and near ties decide which", requests=near_ties(ITEM)
)
class TopPatches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.score = nn.Linear(4, 1)
        self.out = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        best = self.score(y).squeeze(-1).topk(5).indices
        return self.out(y.gather(1, best.unsqueeze(-1).expand(-1, -1, 4)))


@specimen(
    "Each vector becomes its nearest code, and near ties decide which", requests=near_ties(ITEM)
)
class NearestCode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.codes = nn.Embedding(8, 4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x)).permute(0, 2, 3, 1)
        nearest = torch.cdist(y.flatten(0, 2), self.codes.weight).argmin(-1)
        return self.out(self.codes(nearest).view(y.shape).permute(0, 3, 1, 2))


@specimen(
    "Activations are rounded to 4 bits, as in quantisation-aware training", requests=near_ties(ITEM)
)
class Rounds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        return self.out((y * 8).round().clamp(-8, 7) / 8)


@specimen(
    "Spikes are comparisons with a threshold, as in spiking networks", requests=near_ties(ITEM)
)
class Spikes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        potential = torch.zeros_like(y := self.norm(self.conv(x)))
        rate = torch.zeros_like(y)
        for _ in range(3):
            potential = potential + y
            fired = (potential > 0.5).float()
            potential = potential - fired
            rate = rate + fired
        return self.out(rate)


@specimen(
    "Weights are binarised by sign inside forward, as in XNOR networks", requests=near_ties(ITEM)
)
class Signs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.binary = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sign(self.norm(self.conv(x)))
        return F.conv2d(y, self.binary.weight.sign())


@specimen(
    "Pixels are sorted and the median is taken, as in robust pooling", requests=near_ties(ITEM)
)
class Sorts(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x)).flatten(2)
        order = y[:, 0].argsort(-1)
        return y.gather(2, order.unsqueeze(1).expand_as(y))


@specimen("Boxes are suppressed by overlap (NMS), so that their number follows the content")
class Suppresses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        import torchvision

        kept = []
        for boxes in self.conv(x).flatten(2).transpose(1, 2).nan_to_num():
            corners = boxes[:, :4].abs().cumsum(1)
            keep = torchvision.ops.nms(corners, boxes[:, 4], 0.5)
            kept.append(self.head(boxes[keep, :4]))
        return kept


@specimen("Functional dropout is left at its default, training=True", draws=True)
class DropoutLeftOn(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.dropout(self.first(x), 0.5))


@specimen("Dropout is switched on inside forward for Monte Carlo estimates", draws=True)
class MonteCarlo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.drop.train()
        return self.second(self.drop(self.first(x)))


@specimen("A latent is drawn from a normal distribution, as in a VAE", draws=True)
class DrawsLatent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv2d(3, 8, 8)
        self.decode = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, _ = self.encode(x).flatten(1).chunk(2, 1)
        return self.decode(torch.distributions.Normal(mean.nan_to_num(), 1.0).sample() + mean)


@specimen("Each pass makes and seeds a generator for its noise")
class SeededNoise(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.Generator().manual_seed(11)
        y = self.first(x)
        return self.second(y + torch.randn(y.shape[1:], generator=noise))


@specimen("Random numbers are drawn only where a value is large", draws=True)
class DrawsSometimes(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if x.nan_to_num(posinf=0, neginf=0).abs().max() > 50:
            y = y + torch.randn_like(y)
        return self.second(y)


@specimen("The input is overwritten in place before it is used")
class OverwritesInput(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(0.5).clamp_(-10, 10)
        return self.second(self.first(x))


@specimen("In-place operations change what a layer returned: ReLU, +=, masked_fill_, swap of rows")
class OverwritesOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.keep = nn.Identity()
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm(self.first(x)))
        z = self.keep(y)
        z += 1
        z.masked_fill_(z > 3, 3)
        z[:, 0], z[:, 1] = z[:, 1].clone(), z[:, 0].clone()
        return self.last(z)
