"""The tests' reference: cloning hooks, registered and removed by hand, without layertap."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def outputs_of(net: nn.Module, x: torch.Tensor, path: str) -> list[Any]:
    """Return a clone of what a module returned at each of its calls."""
    seen: list[Any] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(output.clone() if isinstance(output, torch.Tensor) else output)

    handle = net.get_submodule(path).register_forward_hook(keep)
    try:
        net(x.clone())
    finally:
        handle.remove()
    return seen


def inputs_of(net: nn.Module, x: torch.Tensor, path: str) -> list[torch.Tensor]:
    """Return a clone of a module's first argument at each of its calls."""
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].clone())

    handle = net.get_submodule(path).register_forward_pre_hook(keep)
    try:
        net(x.clone())
    finally:
        handle.remove()
    return seen
