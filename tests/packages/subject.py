"""Shared by the groups of packages: a public model with random weights, and its requests."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn

from zoo.specimen import Requests, Specimen, ids

__all__ = ["Subject", "images", "subject", "subjects_in", "texts", "tokens", "waves"]

_SEED = 11


@dataclass(frozen=True)
class Subject(Specimen):
    """A public model. It keeps no state outside of its instance, so fresh means newly built."""

    def fresh(self) -> nn.Module:
        """See Specimen."""
        net = self.build()
        net.eval()
        for parameter in net.parameters():
            parameter.requires_grad_(False)
        return net

    @contextmanager
    def served(self) -> Iterator[Subject]:
        """See Specimen."""
        yield self


def images(*item: int) -> list[torch.Tensor]:
    """Return four batches of one or two images, with different ranges of values."""
    generator = torch.Generator().manual_seed(5)
    one = torch.rand((1, *item), generator=generator)
    two = torch.randn((2, *item), generator=generator)
    unlike = torch.randn((2, *item), generator=generator)
    unlike[1] *= 4
    return [one, two, unlike, torch.randn((1, *item), generator=generator) * 2]


waves = images


def tokens(length: int, vocabulary: int) -> list[torch.Tensor]:
    """Return four batches of ids over the whole vocabulary, one of them padded."""
    some = ids(length, vocabulary)
    return [some[6], some[0], some[1][:2], some[3][:1]]


def texts(vocabulary: int, *more: str) -> list[dict[str, torch.Tensor]]:
    """Return four batches of ids of other lengths and sizes: padded, left out of a mask, whole.

    Args:
        vocabulary: The number of ids.
        more: Inputs besides ``input_ids`` and ``attention_mask`` that are zeros and ones.
    """
    generator = torch.Generator().manual_seed(9)

    def batch(size: int, length: int, kept: Sequence[int] = (), *, left: bool = False) -> dict:
        given = {"input_ids": torch.randint(1, vocabulary, (size, length), generator=generator)}
        if kept:
            mask = torch.zeros(size, length, dtype=torch.int64)
            for row, count in zip(mask, kept, strict=True):
                row[length - count if left else 0 : length if left else count] = 1
            given["attention_mask"] = mask
            given["input_ids"] *= mask
        for name in more:
            given[name] = torch.randint(0, 2, (size, length), generator=generator)
        return given

    return [
        batch(1, 12, [12]),
        batch(2, 9, [9, 4]),
        batch(2, 7),
        batch(3, 12, [12, 5, 8], left=True),
    ]


def subject(
    item: tuple[int, ...] | None,
    requests: Requests,
    *,
    package: str,
    draws: bool = False,
    inputs: Mapping[str, str] | None = None,
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Make a function that builds a public model a subject.

    Args:
        item: The sizes of one item, without the batch; None where there are ``inputs``.
        requests: Batches that are asked for.
        package: The package that it comes from, for the table.
        draws: Whether a pass draws random numbers.
        inputs: What the model takes, as a factory declares it; None to read and try it.
    """

    def enter(made: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                torch.manual_seed(_SEED)
                return _settled(made())

        if inputs:
            build.inputs = dict(inputs)
        made.build = build
        made.subject = Subject(
            name=made.__name__,
            awkward=package,
            build=build,
            source=f"{made.__module__}:{made.__name__}.build",
            item=item,
            requests=requests,
            draws=draws,
        )
        return made

    return enter


def _settled(net: nn.Module) -> nn.Module:
    """Give batch norms statistics; new ones would be almost the identity."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.7, 1.4)
    return net


def subjects_in(module: ModuleType) -> list[Subject]:
    """Return the subjects that a module defines, in its order."""
    found = (getattr(value, "subject", None) for value in vars(module).values())
    return [value for value in found if isinstance(value, Subject)]
