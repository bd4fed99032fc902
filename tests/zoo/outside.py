"""Models whose state is outside of the instance, where no walk over its attributes meets it."""

from __future__ import annotations

import functools
import gc
import itertools
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from zoo.remembering import Pair
from zoo.specimen import specimen
from zoo.within import pause

_LAST: dict[str, torch.Tensor] = {}
_PASSES = 0
_COUNT = itertools.count(1)


@specimen("A global of the module passes a feature from one layer to another")
class GlobalFeature(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _LAST["first"] = self.first(x)
        pause()
        return self.second(_LAST["first"])


@specimen("A global counts the passes, and the third one is another computation")
class GlobalCounter(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global _PASSES  # noqa: PLW0603 - what the specimen is about
        _PASSES += 1
        y = self.first(x)
        return self.second(y if _PASSES < 3 else y * 2)


@specimen("itertools.count in a global gives each pass another number")
class GlobalIterator(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) * next(_COUNT))


@specimen("A list on the class is every instance's stack, as in old recurrent code")
class ClassStack(Pair):
    stack: list[torch.Tensor] = []  # noqa: RUF012 - what the specimen is about

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.stack.append(self.first(x))
        pause()
        return self.second(self.stack.pop())


@specimen("A class attribute is rebound by type(self), and every instance reads it")
class ClassAttribute(Pair):
    mean = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        type(self).mean = 0.5 * self.mean + 0.5 * float(y.mean().nan_to_num())
        return self.second(y - type(self).mean)


@specimen("A mutable default argument is the cache")
class DefaultArgument(Pair):
    def forward(self, x: torch.Tensor, cache: list[torch.Tensor] = []) -> torch.Tensor:  # noqa: B006
        y = self.first(x)
        cache.append(y.mean((0, 2, 3), keepdim=True)[0].nan_to_num())
        return self.second(y + cache[0])


@specimen("The factory's closure holds a counter that forward raises by nonlocal")
def closure_counter() -> nn.Module:
    passes = 0

    class Counting(Pair):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal passes
            passes += 1
            return self.second(self.first(x) / passes)

    return Counting()


@functools.cache
def _ramp(width: int) -> torch.Tensor:
    return torch.linspace(-1, 1, width)


@specimen("functools.cache keeps position tables by their length, for ever")
class CachedTable(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(y + _ramp(y.shape[-1]))


@specimen("functools.lru_cache on a method is keyed by the tensor's identity")
class CachedByIdentity(Pair):
    @functools.lru_cache(maxsize=4)  # noqa: B019 - what the specimen is about
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.encode(x) + self.encode(x))


_BY_ADDRESS: dict[int, torch.Tensor] = {}


@specimen("A global memo is keyed by data_ptr, which another input gets once the first is gone")
class CachedByAddress(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = x.data_ptr()
        if key not in _BY_ADDRESS:
            _BY_ADDRESS[key] = self.first(x)
        return self.second(_BY_ADDRESS[key])


@specimen("The global random state is seeded in forward, so that its noise is the same each time")
class SeedsGlobally(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        torch.manual_seed(0)
        pause()
        return self.second(y + torch.randn(y.shape[1:]))


@specimen("Noise of Python's random module, drawn in forward", draws=True)
class PythonNoise(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) * random.random())


@specimen("Noise of NumPy's global generator, drawn in forward", draws=True)
class NumpyNoise(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) * float(np.random.rand()))


@specimen("forward replaces a function of torch while it runs, as profilers and patches do")
class PatchesTorch(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before: Callable[..., torch.Tensor] = F.relu
        F.relu = F.gelu
        try:
            y = self.first(x)
            pause()
            return self.second(F.relu(y))
        finally:
            F.relu = before


@specimen("forward changes torch's default dtype and puts it back")
class DefaultDtype(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        torch.set_default_dtype(torch.float64)
        try:
            pause()
            ramp = torch.linspace(0, 1, y.shape[-1])
        finally:
            torch.set_default_dtype(torch.float32)
        return self.second(y + ramp.to(y.dtype))


@specimen("forward collects garbage and empties caches, as careful authors do")
class CollectsGarbage(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        gc.collect(0)
        return self.second(y)
