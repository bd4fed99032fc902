"""Builds modules without the random numbers that their weights overwrite anyway.

Note [Random numbers that nobody sees]
    A module fills its parameters with random numbers when it is made. If it gets its weights from a
    file, they are overwritten, and were drawn for nothing: most of the 0.4 s in which resnet50 is
    built, as it draws two sets of them. So they are left out while such a module is made, and its
    parameters have no defined value until they are loaded. Only the file decides what they are,
    since every parameter must be in it; one that was not written makes the module be built again,
    with its random numbers.

    This is for libraries whose modules are known. The code of a user's factory may compute
    something else from its random weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["built_with_weights"]

_log = logging.getLogger(__name__)

_FILLS = frozenset(
    {
        torch.Tensor.normal_,
        torch.Tensor.uniform_,
        # These ask for modes themselves, and are not seen within.
        nn.init.kaiming_uniform_,
        nn.init.normal_,
        nn.init.uniform_,
    }
)

_SHAPES = frozenset(
    {torch.Tensor.add_, torch.Tensor.clamp_, torch.Tensor.erfinv_, torch.Tensor.mul_}
)
"""What ``nn.init.trunc_normal_`` does with the numbers."""


def built_with_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module that gets all of its weights; see Note [Random numbers that nobody sees].

    Args:
        build: Makes the module and loads its weights. It is called again if a parameter was left
            without a value.

    Passes on any exception of ``build``.
    """
    mode = _Unfilled()
    with mode:
        module = build()
    left = mode.left_of(module)
    if not left:
        return module
    _log.info("built again with random numbers, as these are not in the file: %s", ", ".join(left))
    return build()


class _Unfilled(TorchFunctionMode):
    """Leaves out what fills parameters with random numbers, in one thread."""

    def __init__(self) -> None:
        super().__init__()
        self._left: dict[int, nn.Parameter] = {}  # Alive, so that no other gets its id.

    def left_of(self, module: nn.Module) -> list[str]:
        """Return the names of a module's parameters that nothing was copied to."""
        return [name for name, value in module.named_parameters() if id(value) in self._left]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one function of torch, or leave it out."""
        given = dict(kwargs or {})
        target = args[0] if args else given.get("tensor")
        if isinstance(target, nn.Parameter):
            if func in _FILLS:
                self._left[id(target)] = target
                return target
            if func in _SHAPES and id(target) in self._left:
                return target
            if func is torch.Tensor.copy_:
                self._left.pop(id(target), None)
        return func(*args, **given)
