"""What a specimen of the zoo is: a small awkward model, and the requests that show its awkwardness.

Note [Fresh]
    A request is compared with a model that has never run before. Some specimens keep state outside
    of their instance: in a global of their module, on their class, in a default argument. So a
    specimen's file is executed again to build this reference, and again for the one that is served.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["Specimen", "finite", "floats", "ids", "specimen", "specimens_in"]

Request = torch.Tensor | dict[str, torch.Tensor]
"""A batch of the only input, or of each input by name."""

Requests = list[Request]

_SEED = 7
_number = itertools.count()


def floats(item: tuple[int, ...]) -> Requests:
    """Return eight batches of very unlike floats: magnitudes, extremes, NaN, ties, sizes 1 to 3."""
    generator = torch.Generator().manual_seed(3)

    def normal(batch: int) -> torch.Tensor:
        return torch.randn((batch, *item), generator=generator)

    unlike = normal(3) * torch.tensor([0.01, 1.0, 100.0]).view(3, *(1,) * len(item))
    holes = normal(2)
    holes.view(2, -1)[0, ::5] = float("nan")
    holes.view(2, -1)[1, ::7] = float("inf")
    ties = torch.full((1, *item), 0.5)
    pixels = torch.rand((2, *item), generator=generator) * 255
    return [normal(2), unlike, holes, normal(1) * 20, ties, pixels, -normal(2).abs(), normal(1)]


@cache
def _usual(item: tuple[int, ...]) -> Requests:
    """Return what ``floats`` does, made once: a house is executed again for each fresh instance."""
    return floats(item)


def finite(item: tuple[int, ...]) -> Requests:
    """Return the batches of ``floats`` without the one that holds NaN and infinity."""
    return [x for x in floats(item) if x.isfinite().all()]


def ids(length: int, vocabulary: int) -> Requests:
    """Return batches of token ids: the whole range, padding, repeats, the first and the last id."""
    generator = torch.Generator().manual_seed(3)

    def some(batch: int) -> torch.Tensor:
        return torch.randint(0, vocabulary, (batch, length), generator=generator)

    padded = some(3)
    padded[0, length // 2 :] = 0
    padded[1, 1:] = 0
    same = torch.full((1, length), 5)
    ends = some(2)
    ends[0, -1] = vocabulary - 1
    ends[1, 0] = vocabulary - 1
    zeros = torch.zeros((1, length), dtype=torch.int64)
    low = torch.randint(0, 2, (2, length), generator=generator)
    return [some(2), padded, same, ends, zeros, low, some(1), some(2)]


@dataclass(frozen=True)
class Specimen:
    """One model of the zoo.

    Attributes:
        name: What it is called.
        awkward: What is awkward about it and which real models are so, in one sentence.
        build: Makes an instance; call ``fresh`` instead where state may be left outside of it.
        source: What ``layertap serve`` takes, ``package.module:factory``.
        item: The sizes of one item, without the batch; None where the factory says its inputs.
        requests: Batches of which every one must be answered rightly; eight callers take one each.
        draws: Whether a pass draws random numbers, so that some values follow chance.
        twin: Whether the reference is a twin without a TorchScript program, as hooks can't see a
            program's layers; its last bits may differ.
    """

    name: str
    awkward: str
    build: Callable[[], nn.Module]
    source: str
    item: tuple[int, ...] | None
    requests: Requests
    draws: bool = False
    twin: bool = False

    @property
    def module(self) -> str:
        """The Python module that it stands in."""
        return self.source.partition(":")[0]

    def fresh(self) -> nn.Module:
        """Return an instance that shares nothing with any other; see Note [Fresh].

        In evaluation mode and without gradients, as models are served: torch takes other kernels,
        whose last bits differ, where a parameter asks for gradients.
        """
        with _executed(self.module) as module:
            found = _factories_in(module)[self.name]
            net = (found.twin if self.twin else found.build)()
            net.eval()
            for parameter in net.parameters():
                if not is_lazy(parameter):
                    parameter.requires_grad_(False)
            return net

    @contextmanager
    def served(self) -> Iterator[Specimen]:
        """Execute the specimen's file again under a name of its own, as a new server would.

        Yields:
            The specimen with a source that finds the copy while the block lasts.
        """
        with _executed(self.module) as module:
            factory = self.source.partition(":")[2]
            yield replace(self, source=f"{module.__name__}:{factory}")


def specimen(
    awkward: str,
    *,
    item: tuple[int, ...] = (3, 8, 8),
    requests: Requests | None = None,
    draws: bool = False,
    twin: Callable[[], nn.Module] | None = None,
) -> Callable[[Any], Any]:
    """Put a module class, or a function that returns a module, into the zoo.

    The class or function gets an attribute ``build``, the factory that ``layertap`` calls, which
    seeds the weights.
    """

    def enter(made: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def seeded(make: Callable[[], nn.Module]) -> nn.Module:
            with _quietly(), torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(_SEED)
                return _trained(make())

        def build() -> nn.Module:
            return seeded(made)

        made.build = build
        made.twin = lambda: seeded(twin or made)
        made.specimen = Specimen(
            name=made.__name__.strip("_"),
            awkward=awkward,
            build=build,
            source=f"{made.__module__}:{made.__name__}.build",
            item=item,
            requests=_usual(item) if requests is None else requests,
            draws=draws,
            twin=twin is not None,
        )
        return made

    return enter


def _trained(net: nn.Module) -> nn.Module:
    """Give batch norms statistics: fresh ones would make them nearly the identity."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net


def _factories_in(module: ModuleType) -> dict[str, Any]:
    """Return the classes and functions of a module that are specimens, by name."""
    found = (value for value in vars(module).values() if hasattr(value, "specimen"))
    return {value.specimen.name: value for value in found}


def specimens_in(module: ModuleType) -> dict[str, Specimen]:
    """Return the specimens that a module defines, by name."""
    found = (getattr(value, "specimen", None) for value in vars(module).values())
    return {s.name: s for s in found if isinstance(s, Specimen)}


@contextmanager
def _executed(original: str) -> Iterator[ModuleType]:
    """Execute a module's file again, as a module that can be imported while the block lasts."""
    file = inspect.getfile(importlib.import_module(original))
    name = f"{original.replace('.', '_')}_{next(_number)}"
    spec = importlib.util.spec_from_file_location(name, Path(file))
    if spec is None:
        raise ImportError(f"no loader for {file}")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and torch.jit look for their module there.
    sys.modules[name] = module
    try:
        with _quietly():
            exec(_code(file), vars(module))  # noqa: S102 - a file of the zoo
        yield module
    finally:
        del sys.modules[name]


@cache
def _code(file: str) -> CodeType:
    """Return a file's code, compiled once."""
    return compile(Path(file).read_text("utf-8"), file, "exec", dont_inherit=True)


@contextmanager
def _quietly() -> Iterator[None]:
    """Build without the warnings of torch's own deprecations: this is about values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
