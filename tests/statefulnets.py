"""Tiny networks whose passes write state, each in another way that real models use.

They are factories for ``package.module:factory``. All take ``[B, 3, 16, 16]`` float32.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import torch
from torch import nn

from oddnets import script

_FILE_WIDE: list[torch.Tensor] = []


class Two(nn.Module):
    """Two convolutions; subclasses keep different state."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 2, 1)
        self.begin()

    def begin(self) -> None:
        """Create the state that the net keeps."""


class Skips(Two):
    """Appends skip connections to a list and pops them."""

    def begin(self) -> None:
        self.skips: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        self.skips.append(x)
        x = self.second(x)
        self.skips.append(x)
        x = x + self.skips.pop()
        return self.out(x + self.skips.pop())


class Fills(Two):
    """Fills a list, reads it from the front, and empties it at the end."""

    def begin(self) -> None:
        self.features: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        self.features.append(x)
        self.features.append(self.second(x))
        x = self.out(self.features[0] + self.features[1])
        self.features.clear()
        return x


class FillsDeque(Two):
    """The same with a queue inside a dictionary inside an object with slots."""

    class Box:
        __slots__ = ("parts",)

        def __init__(self) -> None:
            self.parts: dict[str, deque[torch.Tensor]] = {"x": deque()}

    def begin(self) -> None:
        self.box = self.Box()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        self.box.parts["x"].append(x)
        x = self.second(x)
        return self.out(x + self.box.parts["x"].popleft())


class Kept:
    """Keeps what a module returned, as fastai's SaveFeatures does."""

    features: Any = None

    def __init__(self, module: nn.Module) -> None:
        self.handle = module.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, given: Any, output: torch.Tensor) -> None:
        self.features = output


class KeptByHooks(Two):
    """Reads what hooks left in objects."""

    def begin(self) -> None:
        self.kept = [Kept(self.first), Kept(self.second)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        time.sleep(0.001)
        return self.out(x + self.kept[0].features * self.kept[1].features)


class Recurrent(Two):
    """Begins with the state at the end of the previous pass."""

    def begin(self) -> None:
        self.h: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        self.h = x if self.h is None or self.h.shape != x.shape else torch.tanh(self.h + x)
        return self.out(self.second(self.h))


class Counts(Two):
    """Multiplies by the number of its passes."""

    passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.out(self.second(self.first(x)) * self.passes)


class CountsOnItsClass(Two):
    """Counts the passes of all nets of its class."""

    passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).passes += 1
        return self.out(self.second(self.first(x)) * type(self).passes)


class FillsItsFile(Two):
    """Appends to a list in its module's globals, and pops."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        _FILE_WIDE.append(x)
        x = self.second(x)
        return self.out(x + _FILE_WIDE.pop())


class Between(Two):
    """Writes an attribute and removes it again, with no module called in between."""

    def begin(self) -> None:
        self.scale: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        self.scale = x.mean((1, 2, 3), keepdim=True)
        x = self.scaled(x)
        self.scale = None
        return self.out(self.second(x))

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.001)
        return x * self.scale


class RunningMean(Two):
    """Subtracts a running mean, which it writes to a buffer in place."""

    def begin(self) -> None:
        self.register_buffer("mean", torch.zeros(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        self.mean.mul_(0.5).add_(x.mean((0, 2, 3), keepdim=True)[0], alpha=0.5)
        return self.out(self.second(x - self.mean))


class Unnoticed(Two):
    """Adds to a buffer's ``data``, which torch does not count as a write."""

    def begin(self) -> None:
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x)) + self.seen
        self.seen.data.add_(1)
        return self.out(x)


class Shrinks(Two):
    """Shrinks its own weight at each pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.second.weight.data = self.second.weight.data * 0.9
        return self.out(self.second(self.first(x)))


class ShrinksInPlace(Two):
    """The same in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.second.weight.data.mul_(0.9)
        return self.out(self.second(self.first(x)))


class Numbers(Two):
    """Keeps numbers in an array of numpy."""

    def begin(self) -> None:
        self.numbers = np.zeros(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.numbers += 1
        return self.out(self.second(self.first(x)) * float(self.numbers[0]))


class OwnChance(Two):
    """Draws from generators of its own."""

    def begin(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.python = random.Random(0)
        self.numpy = np.random.default_rng(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        noise = torch.rand(1, generator=self.generator) + self.python.random() + self.numpy.random()
        return self.out(x * noise)


class Noisy(Two):
    """Draws from the process's random numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(nn.functional.dropout(self.second(self.first(x)), 0.5, training=True))


class Cycles(Two):
    """Takes the next value of an endless iterator, which can't be rewound."""

    def begin(self) -> None:
        self.factors = itertools.cycle([1.0, 2.0, 3.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.first(x)) * next(self.factors))


class Locks(Two):
    """Holds a lock while it runs, and would not release it if its pass ended early."""

    def begin(self) -> None:
        self.lock = threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.lock.acquire()
        x = self.out(self.second(self.first(x)))
        self.lock.release()
        return x


class DefaultArgument(Two):
    """Keeps its input in a default argument."""

    def forward(self, x: torch.Tensor, kept: list[torch.Tensor] = []) -> torch.Tensor:  # noqa: B006
        x = self.first(x)
        kept.append(x)
        return self.out(self.second(kept[0] + x))


class Closure(Two):
    """Keeps a number in a closure."""

    def begin(self) -> None:
        passes = 0

        def count() -> int:
            nonlocal passes
            passes += 1
            return passes

        self.count = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.first(x)) * self.count())


class CacheOfSizes(Two):
    """Keeps a table of positions for each size that occurred."""

    def begin(self) -> None:
        self.tables: dict[tuple[int, int], torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = (x.shape[-2], x.shape[-1])
        if size not in self.tables:
            self.tables[size] = torch.arange(size[0] * size[1]).view(size) / 100.0
        return self.out(self.second(self.first(x) + self.tables[size]))


class BatchStart(nn.Module):
    """Creates its initial state again if the batch size changes, like fastai's AWD_LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(16, 8, batch_first=True)
        self.out = nn.Linear(8, 2)
        self.size = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mean(1)
        if len(x) != self.size:
            self.size = len(x)
            self.start = (torch.zeros(1, self.size, 8), torch.zeros(1, self.size, 8))
        return self.out(self.rnn(x, self.start)[0])


class Groups(Two):
    """Keeps sets, ordered and defaulting dictionaries, and refers to itself."""

    def begin(self) -> None:
        self.sizes: set[int] = set()
        self.order: OrderedDict[str, int] = OrderedDict(a=1, b=2)
        self.groups: defaultdict[str, list[float]] = defaultdict(list)
        vars(self)["me"] = [self]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = len(self.sizes) + next(iter(self.order.values())) + len(self.groups["x"])
        self.sizes.add(time.perf_counter_ns())
        self.order.move_to_end("a")
        self.groups["x"].append(float(x.shape[-1]))
        return self.out(self.second(self.first(x)) * factor)


class ReadOnly(dict[str, int]):
    """A read-only dictionary, like diffusers' FrozenDict."""

    def _no(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("read-only")

    update = clear = pop = popitem = setdefault = __setitem__ = __delitem__ = _no  # type: ignore[assignment]


class Frozen(Two):
    """Has a read-only dictionary, dropout, and no symbolic trace."""

    def begin(self) -> None:
        self.config = ReadOnly(width=4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, *unused: Any) -> torch.Tensor:
        if x.mean() > 1e9:
            return x
        return self.out(self.drop(self.second(self.first(x))))


class OwnModes(Two):
    """Has a ``train`` that returns nothing and leaves a dropout in training mode."""

    def begin(self) -> None:
        self.drop = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.drop.training = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(self.second(self.first(x))))


class HooksItself(Two):
    """Adds a hook to a child while it runs, and removes it at the end."""

    def begin(self) -> None:
        self.calls: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        handle = self.first.register_forward_hook(lambda module, given, output: output * 2)
        x = self.out(self.second(self.first(x)))
        handle.remove()
        return x


class NormalisesWeights(Two):
    """Computes the same weight again in each pass, which no other pass can notice."""

    def begin(self) -> None:
        self.raw = nn.Parameter(torch.rand(4, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight = self.raw / self.raw.norm()
        return self.out(self.second(nn.functional.conv2d(self.first(x), self.weight)))


class Script(nn.Module):
    """A net whose program keeps a number and a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.passes = 0
        self.last = torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        x = self.conv(x) * self.passes + self.last
        self.last = x.mean()
        return x


class ScriptedChild(Two):
    """Has a child that is such a program."""

    def begin(self) -> None:
        self.program = script(Script())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.program(x) + self.first(x)))


class PerThread(Two):
    """Keeps state for each thread."""

    def begin(self) -> None:
        self.local = threading.local()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.local.passes = getattr(self.local, "passes", 0) + 1
        return self.out(self.second(self.first(x)) * self.local.passes)


class Unregistered(Two):
    """Keeps modules in a list, which torch does not search."""

    def begin(self) -> None:
        self.hidden = [nn.Conv2d(4, 4, 1)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.hidden[0](self.first(x))))


class Grows(Two):
    """Keeps state for large items only."""

    def begin(self) -> None:
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        if x.shape[-1] > 20:
            self.passes += 1
            x = x * self.passes
        return self.out(x)


NETS = {
    kind.__name__: kind
    for kind in (
        Skips, Fills, FillsDeque, KeptByHooks, Recurrent, Counts, CountsOnItsClass, FillsItsFile,
        Between, RunningMean, Unnoticed, Shrinks, ShrinksInPlace, Numbers, OwnChance, Noisy, Cycles,
        Locks, DefaultArgument, Closure, CacheOfSizes, BatchStart, Groups, Frozen, OwnModes,
        HooksItself, NormalisesWeights, ScriptedChild, PerThread, Unregistered, Grows,
    )
}  # fmt: skip


def build(name: str) -> nn.Module:
    """Return a fresh net with the same weights each time, as a fresh process would."""
    CountsOnItsClass.passes = 0
    _FILE_WIDE.clear()
    for default in DefaultArgument.forward.__defaults__ or ():
        default.clear()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        net = NETS[name]()
    net.eval()
    return net
