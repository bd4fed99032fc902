"""Gradients by plain PyTorch on a module of the test's own, without layertap.

Two ways that share nothing: autograd on a copy of the module without in-place modules, and finite
differences, which know no autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["Score", "by_autograd", "by_differences", "by_perturbation", "with_gradients"]

Score = Callable[[Any], torch.Tensor]
"""Makes the sum of the items' numbers from the model's result."""


def not_in_place(net: nn.Module) -> nn.Module:
    """Return a copy in which no module works in place."""
    net = copy.deepcopy(net).eval()
    for module in net.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return net


@contextmanager
def changed(
    net: nn.Module, path: str, call: int, change: Callable[[Any], Any], *, before: bool
) -> Iterator[None]:
    """Change what a call of a module returns, or the arguments that it is given."""
    calls = 0

    def count() -> bool:
        nonlocal calls
        calls += 1
        return calls - 1 == call

    module = net.get_submodule(path)
    handle = (
        module.register_forward_pre_hook(lambda _, args: change(args) if count() else None)
        if before
        else module.register_forward_hook(lambda _, args, out: change(out) if count() else None)
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def with_gradients() -> Iterator[None]:
    """Allow gradients in a block, as the tests run without."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def by_autograd(
    build: Callable[[], nn.Module],
    x: torch.Tensor,
    score: Score,
    path: str,
    call: int = 0,
    *,
    before: bool = False,
) -> torch.Tensor:
    """Return the gradient of a score with respect to a module's plain output or only argument.

    Every parameter requires a gradient here, and the value is watched by ``retain_grad``.
    """
    seen: list[torch.Tensor] = []

    def watch(value: Any) -> Any:
        # Another tensor than any that the model has, as for nn.Identity.
        copied = (value[0] if before else value) + 0
        copied.retain_grad()
        seen.append(copied)
        return (copied,) if before else copied

    with with_gradients():
        net = not_in_place(build()).requires_grad_(True)
        given = x.clone()
        if given.is_floating_point():
            given.requires_grad_(True)
        with changed(net, path, call, watch, before=before):
            score(net(given)).backward()
    (value,) = seen
    assert value.grad is not None
    return value.grad


def by_perturbation(
    net: nn.Module,
    x: torch.Tensor,
    score: Score,
    change: Callable[[Any, torch.Tensor], Any],
    *,
    path: str,
    direction: torch.Tensor,
    call: int = 0,
    step: float = 1e-6,
) -> float:
    """Return the derivative of a score in a direction of a module's output, by differences.

    Args:
        net: The module.
        x: Its input.
        score: The score.
        change: Returns the module's output with something added to the tensor in question.
        path: The module.
        direction: The direction, of the tensor's shape.
        call: Which of its calls.
        step: The step of the central difference.
    """
    net = not_in_place(net)

    def at(factor: float) -> float:
        def move(value: Any) -> Any:
            return change(value, direction * factor)

        with torch.no_grad(), changed(net, path, call, move, before=False):
            return float(score(net(x.clone())))

    return (at(step) - at(-step)) / (2 * step)


def by_differences(
    net: nn.Module, x: torch.Tensor, score: Score, direction: torch.Tensor, step: float = 1e-6
) -> float:
    """Return the derivative of a score in a direction of the model's own input."""
    net = not_in_place(net)
    with torch.no_grad():
        more, less = (float(score(net(x + direction * s))) for s in (step, -step))
    return (more - less) / (2 * step)
