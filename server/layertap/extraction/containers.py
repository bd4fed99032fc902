"""Containers of tensors as named tensors: tuples by index, mappings and dataclasses by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

__all__ = ["flatten", "pick"]

MAX_DEPTH = 8


def flatten(value: Any, depth: int = 0) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """Yield (way into the container, tensor) for every tensor in ``value``, in order.

    A plain tensor yields itself with the empty way. Values that hold no tensor yield nothing.
    Nesting deeper than MAX_DEPTH is not followed.
    """
    if isinstance(value, torch.Tensor):
        yield (), value
    elif depth < MAX_DEPTH:
        for key, member in _members(value):
            for way, tensor in flatten(member, depth + 1):
                yield (key, *way), tensor


def pick(value: Any, way: tuple[str, ...]) -> torch.Tensor | None:
    """Return the tensor at the end of ``way``, or None where there is none."""
    for step in way:
        value = dict(_members(value)).get(step)
    return value if isinstance(value, torch.Tensor) else None


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(key), member) for key, member in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        yield from ((str(index), member) for index, member in enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in fields(value))
