"""Gradients along a sweep of values: integrated gradients and SmoothGrad.

Note [Sweeps]
    These methods put other values in a value's place, several for each item, and add up the
    gradients there. The objective stays what it was at the value itself: the element of a maximum
    is chosen once. Several of a sweep's values run in one pass, as further items of the batch, as
    far as memory allows; where the items of a batch influence each other, one by one.

Sources: integrated gradients, Sundararajan et al. 2017 (arXiv:1703.01365); SmoothGrad, Smilkov et
al. 2017 (arXiv:1706.03825).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from layertap.errors import InvalidInputError
from layertap.extraction.operands import ItemAxis
from layertap.selection import IntegrationRule, Method, Sweep

__all__ = ["Base", "SentBaseline", "Step", "SweepTotal", "SweptPass", "steps_of"]

Base = float | torch.Tensor
"""The baseline of integrated gradients: each of its elements, or a tensor of the value's shape."""


@dataclass(frozen=True, slots=True)
class SentBaseline(Sweep):
    """The options of integrated gradients whose baseline is a tensor of the request.

    The tensor itself is one of the request's operands, so that it is no part of a plan.

    Attributes:
        number: Which of the request's baselines it is.
    """

    number: int = 0


class Step(NamedTuple):
    """One value of a sweep.

    Attributes:
        at: For integrated gradients, how far it is from the baseline (0) to the value (1); for
            SmoothGrad, the number of the sample.
        weight: The weight of its gradient.
    """

    at: float
    weight: float


def steps_of(method: Method, sweep: Sweep) -> list[Step]:
    """Return the values of a sweep.

    That of integrated gradients ends with the baseline, whose gradient does not count: it tells
    the objective there.
    """
    count = sweep.steps
    if method is Method.SMOOTH_GRAD:
        return [Step(float(number), 1 / count) for number in range(count)]
    return [*(Step(at, weight) for at, weight in _nodes(sweep.rule, count)), Step(0.0, 0.0)]


def _nodes(rule: IntegrationRule, count: int) -> list[tuple[float, float]]:
    match rule:
        case IntegrationRule.GAUSS_LEGENDRE:
            nodes, weights = np.polynomial.legendre.leggauss(count)
            return list(zip(((nodes + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))
        case IntegrationRule.TRAPEZOID:
            ends = {0, count - 1}
            between = 1 / (count - 1)
            return [
                (number * between, between / 2 if number in ends else between)
                for number in range(count)
            ]
        case _:
            shift = {
                IntegrationRule.LEFT: 0.0,
                IntegrationRule.MIDDLE: 0.5,
                IntegrationRule.RIGHT: 1.0,
            }[rule]
            return [((number + shift) / count, 1 / count) for number in range(count)]


@dataclass(frozen=True, eq=False)
class SweptPass:
    """The values of some steps, for a batch that has each item once for each step.

    Attributes:
        method: The method.
        sweep: Its options.
        steps: The steps of this pass. The batch has all items for the first of them, then all for
            the second, and so on.
        axis: Where the items are in the value.
        base: The baseline of integrated gradients; a tensor has the shape of the value of one step.
    """

    method: Method
    sweep: Sweep
    steps: Sequence[Step]
    axis: ItemAxis
    base: Base = 0.0

    def change(self, value: torch.Tensor) -> torch.Tensor:
        """Return what the model goes on with in place of its own value."""
        parts = self.split(value)
        if isinstance(self.base, torch.Tensor) and self.base.shape != parts[0].shape:
            raise InvalidInputError(
                f"sweep: baseline: got {list(self.base.shape)}, but the layer's value is "
                f"{list(parts[0].shape)} on this input"
            )
        if self.method is Method.SMOOTH_GRAD:
            changed = [
                self._noisy(part, step) for part, step in zip(parts, self.steps, strict=True)
            ]
        else:
            base = self.base
            changed = [
                base + (part - base) * step.at for part, step in zip(parts, self.steps, strict=True)
            ]
        return torch.cat(changed, self.axis.axis or 0) if len(changed) > 1 else changed[0]

    def split(self, value: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the parts of a value that belong to each step."""
        if len(self.steps) == 1:
            return [value]
        return value.chunk(len(self.steps), self.axis.axis or 0)

    def _noisy(self, part: torch.Tensor, step: Step) -> torch.Tensor:
        # The same noise for each item, so that an item's result is that of a request with it alone.
        size = 1 if self.axis.axis is None else part.shape[self.axis.axis] // self.axis.per_item
        items = self.axis.items(part, size)
        generator = torch.Generator().manual_seed((self.sweep.seed << 16) + int(step.at))
        noise = torch.randn(items.shape[1:], generator=generator, dtype=torch.float32)
        flat = items.reshape(size, -1)
        spread = (flat.amax(1) - flat.amin(1)) * self.sweep.noise
        shape = (size, *(1 for _ in items.shape[1:]))
        added = noise.to(items.device, items.dtype) * spread.reshape(shape)
        return part + self.axis.joined(added, part.shape)


class SweepTotal:
    """Adds up the gradients of a sweep.

    Args:
        method: The method.
        base: The baseline of integrated gradients; a tensor has the shape of the value.

    Attributes:
        at_baseline: The objective of each item at the baseline of integrated gradients.
    """

    def __init__(self, method: Method, base: Base) -> None:
        self._method, self._base = method, base
        self._sum: torch.Tensor | None = None
        self._value: torch.Tensor | None = None
        self.at_baseline: torch.Tensor

    def see(self, value: torch.Tensor) -> None:
        """Note the model's own value."""
        self._value = value

    def add(self, swept: SweptPass, gradient: torch.Tensor, numbers: torch.Tensor) -> None:
        """Add the gradients of one pass.

        Args:
            swept: What the pass ran.
            gradient: The gradient of its value.
            numbers: The number of each of its items.
        """
        parts = zip(
            swept.split(gradient), numbers.chunk(len(swept.steps)), swept.steps, strict=True
        )
        for part, mine, step in parts:
            if not step.weight:
                self.at_baseline = mine
                continue
            # Half precision would lose small gradients in the sum.
            wide = part.to(torch.promote_types(part.dtype, torch.float32)) * step.weight
            self._sum = wide if self._sum is None else self._sum + wide

    def result(self) -> torch.Tensor:
        """Return what the method makes of all of them."""
        if self._sum is None or self._value is None:
            raise AssertionError("a sweep has at least one step")
        if self._method is Method.SMOOTH_GRAD:
            return self._sum
        return self._sum * (self._value.to(self._sum.dtype) - self._base)
