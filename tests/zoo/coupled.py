"""Models in which the items of a batch meet, or whose batch is not where one looks for it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from zoo.remembering import Pair
from zoo.specimen import finite, floats, specimen

ITEM = (3, 8, 8)


@specimen("Batch norm without running statistics uses those of the batch in evaluation mode too")
class BatchStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.conv(x)))


@specimen("Everything is divided by the batch's largest value where that is over 1")
class BatchPeak(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(y / y.abs().amax().clamp(min=1))


@specimen("Items are clipped by a threshold that only a far larger item of the batch can raise")
class BatchOutlier(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        largest = x.nan_to_num(posinf=0, neginf=0).abs().amax((1, 2, 3))
        loud = largest > 50 * largest.median()
        y = self.first(x)
        return self.second(torch.where(loud.any(), -y, y))


@specimen("Softmax goes over dimension 0, the batch, as it did by default in old code")
class SoftmaxOverBatch(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.softmax(self.first(x), dim=0))


@specimen("Items are sorted over the batch by a score, as detectors' batched post-processing does")
class SortsBatch(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(y[y.mean((1, 2, 3)).argsort()])


@specimen("The logits compare each item with each, as CLIP's and SimCLR's do")
class ItemsByItems(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8)
        self.norm = nn.LayerNorm(4)
        self.scores = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x).flatten(1))
        return self.scores(y @ y.T)


@specimen("Part of the channels is shifted to the next item, as TSM shifts clips' frames")
class ShiftsItems(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(torch.cat([y[:, :1].roll(1, 0), y[:, 1:]], 1))


@specimen("Sums run along the batch", requests=finite(ITEM))
class SumsAlongBatch(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).cumsum(0))


@specimen("Two crops of every item are joined view after view, as DINO's multi-crop does")
class TwoCrops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        crops = torch.cat([x[..., :4, :4], x[..., 4:, 4:]])
        y = self.head(self.conv(crops).mean((2, 3)))
        return y.chunk(2)[0] - y.chunk(2)[1]


@specimen("Windows are cut out and become the batch, item by item, as in Swin")
class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.mix = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        windows = y.unfold(2, 4, 4).unfold(3, 4, 4).reshape(len(x) * 16, 16)
        return self.mix(windows).view(len(x), 4, 8, 8)


@specimen("The batch is the second dimension between the layers, as in CLIP and in many RNNs")
class BatchSecond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, stride=4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).flatten(2).permute(2, 0, 1)
        y = self.norm(y + self.attention(y, y, y, need_weights=False)[0])
        return y.permute(1, 0, 2)


@specimen("The batch is the last dimension between the layers, as in hand-written kernels")
class BatchLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8)
        self.turned = nn.Identity()
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.turned(self.conv(x).flatten(1).T).T)


@specimen("A layer returns something of the weights alone, which has no batch")
class NoBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.table = nn.Embedding(8, 4)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.table(torch.arange(8)).T[None, :, None, :]
        return self.last(self.first(x) + bias)


@specimen("The batch is cut into pieces of two items, of which the last one is padded")
class Pieces(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) % 2:
            x = torch.cat([x, torch.zeros_like(x[:1])])
        return torch.cat([self.second(self.first(piece)) for piece in x.split(2)])


@specimen("Batches of more than four items take another branch, as chunked attention does")
class OtherForLarge(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(y if len(x) <= 4 else -y)


@specimen("A batch of one is squeezed, so that its values have another rank")
class Squeezes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).squeeze())


@specimen("It leaves early once all items of the batch are sure, as BranchyNet does")
class LeavesEarly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.exit = nn.Conv2d(4, 2, 8)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        early = self.exit(y)
        if bool((early.softmax(1).amax(1) > 0.6).all()):
            return early
        return self.last(self.second(y))


@specimen("It iterates to a fixed point until the whole batch is near enough, as DEQ models do")
class FixedPoint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inject = nn.Conv2d(3, 4, 8)
        self.step = nn.Linear(4, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = self.inject(x).flatten(1)
        z = torch.zeros_like(given)
        for _ in range(12):
            nearer = torch.tanh(0.5 * self.step(z) + given)
            if (nearer - z).abs().max() < 1e-2:
                break
            z = nearer
        return self.out(z)


@specimen("The result is one number for the whole batch, as a loss is")
class LossInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.loss = nn.MSELoss()
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.out(y) + self.loss(y, torch.zeros_like(y))


@specimen("Clips of frames are folded into the batch before the convolutions", item=(4, 3, 8, 8))
class FoldsFrames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8)
        self.time = nn.Conv1d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frames = self.conv(x.flatten(0, 1)).flatten(1)
        return self.head(self.time(frames.view(len(x), -1, 4).transpose(1, 2)).mean(2))


@specimen(
    "A graph of the nearest items of the batch is built and averaged over", requests=floats(ITEM)
)
class NearestItems(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8)
        self.out = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).flatten(1)
        distance = torch.cdist(y.nan_to_num(), y.nan_to_num())
        near = distance.topk(min(2, len(x)), largest=False).indices
        return self.out(y[near].mean(1))
