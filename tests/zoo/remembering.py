"""Models that remember something from one pass to the next, in plain sight of their attributes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from zoo.specimen import specimen


class Pair(nn.Module):
    """Two convolutions, between which most specimens do something awkward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)


@specimen("A streaming detector keeps the last frames' features in a deque and averages over them")
class FrameDeque(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.frames: deque[torch.Tensor] = deque(maxlen=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        self.frames.append(y.mean(0))
        return self.second(y + torch.stack(list(self.frames)).mean(0))


@specimen("A cache by shape holds something of the first input's content, as a careless memo does")
class ContentByShape(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.memo: dict[tuple[int, ...], torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        key = tuple(y.shape[1:])
        if key not in self.memo:
            self.memo[key] = y.mean(0)
        return self.second(y - self.memo[key])


@specimen("Position biases are memoised by shape, as Swin's attention masks are")
class BiasByShape(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.memo: dict[tuple[int, ...], torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        height, width = y.shape[-2:]
        if (height, width) not in self.memo:
            rows = torch.arange(height, dtype=y.dtype)[:, None]
            self.memo[height, width] = rows / height - torch.arange(width, dtype=y.dtype) / width
        return self.second(y + self.memo[height, width])


@specimen("Rotary tables start as None and are built by the first pass, as in most language models")
class LazyTables(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        width = y.shape[-1]
        if self.table is None or len(self.table) < width:
            self.table = torch.cos(torch.arange(width, dtype=torch.float32) / 7)
        return self.second(y * self.table[:width])


@specimen("A buffer is registered during the first pass, as old positional encodings are")
class LateBuffer(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if not hasattr(self, "ramp"):
            self.register_buffer("ramp", torch.linspace(0, 1, y.shape[-1]))
        return self.second(y + self.ramp)


@specimen("A counter switches to another branch at the fourth pass, as warm-up schedules do")
class SwitchesAtFourth(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        y = self.first(x)
        return self.second(y if self.passes < 4 else -y)


@specimen("A counter in a buffer, raised in place, switches after the hundredth pass")
class SwitchesLate(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        y = self.first(x)
        return self.second(torch.where(self.passes > 100, -y, y))


@specimen("ActNorm takes its scale from the first batch that it ever sees, as in Glow")
class ActNorm(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ready", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4, 1, 1))
        self.register_buffer("scale", torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if not self.ready:
            self.mean.copy_(y.mean((0, 2, 3), keepdim=True)[0])
            self.scale.copy_(y.std((0, 2, 3), keepdim=True)[0] + 1e-3)
            self.ready.fill_(1)
        return self.second((y - self.mean) / self.scale)


@specimen("A code book is set from the first batch, by a flag that is a Python bool, as in VQ-VAE")
class CodeBook(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.started = False
        self.codes = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        flat = y.permute(0, 2, 3, 1).reshape(-1, 4)
        if not self.started:
            self.codes.data.copy_(flat[:4])
            self.started = True
        nearest = torch.cdist(flat, self.codes).argmin(1)
        quantised = self.codes[nearest].view(len(x), *x.shape[-2:], 4).permute(0, 3, 1, 2)
        return self.second(quantised)


@specimen("A recurrent cell keeps its hidden state in self.h, as streaming models do")
class KeepsHidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 3, padding=1)
        self.cell = nn.GRUCell(4, 4)
        self.head = nn.Linear(4, 2)
        self.h: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x).mean((2, 3))
        before = self.h
        if before is None or before.shape != y.shape:
            before = torch.zeros_like(y)
        self.h = self.cell(y, before)
        return self.head(self.h)


@specimen("A decoder grows a cache of keys with every call, as generation does")
class KeyCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Conv2d(3, 4, 8)
        self.out = nn.Linear(4, 4)
        self.cache: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = self.key(x).flatten(1)
        self.cache.append(keys.mean(0))
        return self.out(keys + torch.stack(self.cache[-8:]).sum(0))


@specimen("A queue of negatives is a buffer written in place at a moving pointer, as in MoCo")
class NegativeQueue(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.randn(8, 4), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        features = F.normalize(y.mean((2, 3)).nan_to_num(), dim=1)
        logits = features @ self.queue.clone().T
        slot = int(self.pointer)
        self.queue[slot] = features[0]
        self.pointer.fill_((slot + 1) % 8)
        return self.second(y) + logits.mean(1)[:, None, None, None]


@specimen(
    "A batch norm is put back into training mode inside forward, as test-time adaptation does"
)
class AdaptsAtTest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.norm.train()
        return self.out(self.norm(self.conv(x)))


@specimen("An EMA copy of the weights is moved towards them in every pass, as a teacher is")
class MovingTeacher(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.teacher(self.first(x))
        with torch.no_grad():
            for mine, theirs in zip(
                self.teacher.parameters(), self.second.parameters(), strict=True
            ):
                mine.mul_(0.5).add_(theirs, alpha=0.5)
        return self.second(y)


@specimen("A hyper-network writes the weights of a convolution from its input, in place")
class WritesWeights(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        scale = self.maker(y.mean((0, 2, 3)).nan_to_num())
        self.second.bias.data.copy_(scale)
        return self.second(y)


@specimen("Each pass replaces a child's parameter by a new one, as fast weights do")
class ReplacesParameter(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        self.second.bias = nn.Parameter(y.mean((0, 2, 3)).nan_to_num(), requires_grad=False)
        return self.second(y)


@specimen("A running mean is a NumPy array that forward writes in place, as signal wrappers do")
class NumpyState(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.mean = np.zeros(4, dtype=np.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        self.mean *= 0.5
        self.mean += y.mean((0, 2, 3)).nan_to_num().numpy() * 0.5
        return self.second(y + torch.from_numpy(self.mean.copy())[:, None, None])


@specimen("A generator object that forward advances gives each pass another scale")
class AdvancesGenerator(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.scales = (1.0 / (n + 1) for n in range(10**6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) * next(self.scales))


@specimen("A torch.Generator of its own, seeded once, gives each pass other noise")
class OwnNoise(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.noise = torch.Generator().manual_seed(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(y + torch.randn(y.shape[1:], generator=self.noise))


class Slotted:
    """An object without a dictionary of attributes."""

    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 0.0


@specimen("State stands in an object with slots, which has no __dict__ to look into")
class SlottedState(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.held = Slotted()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        self.held.total += 1
        return self.second(y * self.held.total)


@dataclass
class Stream:
    """The state of a stream, two containers deep."""

    layers: list[dict[str, Any]]


@specimen(
    "State stands in a dictionary in a list in a dataclass, as in Mamba's inference parameters"
)
class DeepState(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.stream = Stream([{"seen": 0, "last": torch.zeros(4, 1, 1)}])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x) + self.stream.layers[0]["last"]
        self.stream.layers[0]["last"] = y.mean((0, 2, 3), keepdim=True)[0]
        return self.second(y)


@specimen("State is the element of a bytearray, as ring buffers for audio have it")
class ByteState(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.ring = bytearray(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.ring[0] = min(self.ring[0] + 1, 255)
        return self.second(self.first(x) * self.ring[0])


@specimen("The head is built by the first pass, when its width is known, as fastai's heads are")
class LateHead(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).mean((2, 3))
        if "head" not in self._modules:
            head = nn.Linear(y.shape[1], 2)
            with torch.no_grad():
                head.weight.fill_(0.5)
                head.bias.fill_(0.1)
            self.head = head
        return self.head(y)


@specimen("After an error it takes its slow path for ever, as guards around fused kernels do")
class FallsBackForGood(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.fused = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = None
        if self.fused:
            try:
                y = self.second(self.first(x))
            except:  # noqa: E722 - as authors do
                self.fused = False
        if y is None:
            y = self.second(-self.first(x))
        return y


@specimen("A running maximum calibrates the activations, as observers of quantisation do")
class Observes(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.full((), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).nan_to_num(posinf=0, neginf=0)
        self.largest = torch.maximum(self.largest, y.abs().amax())
        return self.second((y / self.largest * 127).round() * self.largest / 127)
