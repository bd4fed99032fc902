"""Models whose state lasts for one pass: what another pass, or an early end, would spoil."""

from __future__ import annotations

import contextvars
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from zoo.remembering import Pair
from zoo.specimen import specimen


def pause() -> None:
    """Let another thread run here, between a write and the read that belongs to it."""
    time.sleep(0.0002)


@specimen("A U-Net appends its skip connections to a list and pops them on the way up")
class SkipList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 4, 3, padding=1)
        self.down2 = nn.Conv2d(4, 4, 3, padding=1)
        self.up2 = nn.Conv2d(4, 4, 3, padding=1)
        self.up1 = nn.Conv2d(4, 2, 3, padding=1)
        self.skips: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down1(x)
        self.skips.append(x)
        x = self.down2(x)
        self.skips.append(x)
        pause()
        x = self.up2(x + self.skips.pop())
        return self.up1(x + self.skips.pop())


@specimen("Features are appended in forward and the list is cleared at its end")
class ClearedAtEnd(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.features: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.features.append(self.first(x))
        pause()
        y = self.second(self.features[0])
        self.features.clear()
        return y


@specimen("Features are cleared when a pass begins, so that the last pass's stay until the next")
class ClearedAtBegin(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.features.clear()
        self.features["first"] = self.first(x)
        pause()
        return self.second(self.features["first"])


@specimen("Hooks that the model registers store features in objects, as fastai's SaveFeatures do")
class SavesByHook(Pair):
    class Saved:
        def __init__(self, module: nn.Module) -> None:
            self.features: torch.Tensor | None = None
            self.hook = module.register_forward_hook(self.keep)

        def keep(self, module: nn.Module, given: object, output: torch.Tensor) -> None:
            self.features = output

    def __init__(self) -> None:
        super().__init__()
        self.saved = self.Saved(self.first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        pause()
        return self.second(y + self.saved.features)


@specimen("The sizes of the input are kept on the model for the decoder, as in many segmenters")
class KeepsSizes(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.size = (0, 0)
        self.shift = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shift = float(x.nan_to_num(posinf=0, neginf=0).mean())
        y = self.first(x)
        pause()
        return self.second(y + self.shift)


@specimen("A child reads what its parent left on it before the call, as conditioning is passed on")
class TellsChild(nn.Module):
    class Child(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.style: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pause()
            return self.conv(x * self.style)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.child = self.Child()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        self.child.style = y.mean((2, 3), keepdim=True)
        return self.child(y)


@specimen("It writes into an output buffer that it allocated once, and returns it by reference")
class OwnOutputBuffer(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.buffer: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if self.buffer is None or self.buffer.shape != y.shape:
            self.buffer = torch.empty_like(y)
        self.buffer.copy_(y)
        pause()
        return self.second(self.buffer)


class Scratch(nn.Module):
    """Returns a buffer of its own that the next call overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scratch", torch.zeros(4, 4, 8, 8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        view = self.scratch[: len(x)]
        view.copy_(x)
        pause()
        return view


@specimen("A child returns a slice of a registered scratch buffer, which its next call overwrites")
class ScratchBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.scratch = Scratch()
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.scratch(self.first(x))
        z = self.scratch(y * 2)
        return self.last(z)


@specimen("It refuses to run twice at once, by a flag that an early end would leave set")
class BusyFlag(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.busy = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.busy:
            raise RuntimeError("already running")
        self.busy = True
        y = self.first(x)
        pause()
        y = self.second(y)
        self.busy = False
        return y


@specimen("It takes a lock by hand and gives it back at its end, so that an early end keeps it")
class HandLock(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.lock.acquire(timeout=0.1):
            raise RuntimeError("the lock was never given back")
        y = self.second(self.first(x))
        self.lock.release()
        return y


@specimen("A block swaps an attribute by a context manager that restores it without a finally")
class SwapsAttribute(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        before, self.scale = self.scale, scale
        yield
        self.scale = before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.scaled(self.scale * 2):
            y = self.first(x * self.scale)
            pause()
            return self.second(y * self.scale)


@specimen("A weak reference to a feature is read later in the pass, as hooks on parents keep one")
class WeakFeature(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.feature: weakref.ref[torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        self.feature = weakref.ref(y)
        pause()
        kept = self.feature()
        return self.second(y if kept is None else y + kept)


@specimen("State is a ContextVar of its own, reset at the end of the pass")
class OwnContextVar(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.depth: contextvars.ContextVar[int] = contextvars.ContextVar("depth", default=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.depth.set(self.depth.get() + 1)
        y = self.second(self.first(x) * self.depth.get())
        self.depth.set(self.depth.get() - 1)
        return y


@specimen("State is kept for each thread apart, and is left behind when a pass ends early")
class ThreadLocalState(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.local = threading.local()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stack = self.local.__dict__.setdefault("stack", [])
        stack.append(x.nan_to_num(posinf=0, neginf=0).mean())
        y = self.second(self.first(x) + sum(stack))
        stack.pop()
        return y


@specimen("A counter of the layer in turn goes up in every block and back to 0 at the end")
class LayerCounter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        self.turn = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            self.turn += 1
            x = block(x) * self.turn
            pause()
        self.turn = 0
        return x


@specimen("A generator runs the layers, and its last statements run only when it is exhausted")
class RunsByGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 1)
        self.open = 0

    def steps(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        self.open += 1
        yield (y := self.first(x) * self.open)
        pause()
        yield self.second(y)
        self.open -= 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return list(self.steps(x))[-1]


@specimen("Children share a list that the model passes to their constructors")
class SharedList(nn.Module):
    class Writer(nn.Module):
        def __init__(self, shared: list[torch.Tensor], channels: int) -> None:
            super().__init__()
            self.shared = shared
            self.conv = nn.Conv2d(channels, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            self.shared.append(x)
            return x

    def __init__(self) -> None:
        super().__init__()
        shared: list[torch.Tensor] = []
        self.one = self.Writer(shared, 3)
        self.two = self.Writer(shared, 4)
        self.shared = shared
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.two(self.one(x))
        pause()
        y = sum(self.shared)
        del self.shared[:]
        return self.last(y)
