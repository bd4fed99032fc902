"""What is inside the arguments of an operation."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

__all__ = ["leaves"]

_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), torch.Tensor, torch.nn.Parameter,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


def leaves(values: Any) -> list[Any]:
    """Return what torch's ``tree_leaves`` does, in a fraction of the time for ordinary arguments.

    A watched pass asks for them several times at each operation.

    Args:
        values: Tensors and other objects in any nesting of containers.
    """
    found: list[Any] = []
    _collect(values, found)
    return found


def _collect(values: Any, found: list[Any]) -> None:
    kind = type(values)
    if kind in _PLAIN:
        found.append(values)
    elif kind is tuple or kind is list:
        for each in values:
            _collect(each, found)
    elif kind is dict:
        for each in values.values():
            _collect(each, found)
    else:  # Other containers, such as named tuples and the results of transformers.
        found.extend(tree_leaves(values))
