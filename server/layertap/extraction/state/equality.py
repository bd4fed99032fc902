"""Compares objects by content.

Note [Equal, not identical]
    A pass that stores an equal value again (``self.size = (7, 7)``, or a weight computed again from
    the same parameters) has changed nothing that another pass could see. So if the objects are not
    the same, their content is compared.
"""

from __future__ import annotations

import math
import pickle
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from layertap.models.tensor_content import is_wrapper

__all__ = ["SCALARS", "equal"]

MAX_COMPARED_DEPTH = 8
"""Levels of nested containers that are compared by content."""

SCALARS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


def equal(one: Any, other: Any, depth: int = 0) -> bool:
    """Return whether two values have equal content; False if that can't be determined."""
    if one is other:
        return True
    if type(one) is not type(other) or depth > MAX_COMPARED_DEPTH:
        return False
    for kinds, equal in _EQUAL:
        if isinstance(one, kinds):
            return equal(one, other, depth + 1)
    attributes = getattr(one, "__dict__", None)
    return (
        type(attributes) is dict
        and bool(attributes)
        and (equal(attributes, vars(other), depth + 1))
    )


def _equal_members(one: Any, other: Any, depth: int) -> bool:
    return len(one) == len(other) and all(
        equal(a, b, depth) for a, b in zip(one, other, strict=True)
    )


def _equal_entries(one: Any, other: Any, depth: int) -> bool:
    return list(one) == list(other) and all(equal(one[key], other[key], depth) for key in one)


def _equal_scalars(one: Any, other: Any, depth: int) -> bool:
    return bool(one == other) or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


_EQUAL: tuple[tuple[Any, Callable[[Any, Any, int], bool]], ...] = (
    (SCALARS, _equal_scalars),
    (torch.Tensor, lambda one, other, _: _same_tensor(one, other)),
    (np.ndarray, lambda one, other, _: pickle.dumps(one) == pickle.dumps(other)),
    ((list, tuple, deque), _equal_members),
    (dict, _equal_entries),
    (
        (set, frozenset),
        lambda one, other, _: all(isinstance(m, SCALARS) for m in (*one, *other)) and one == other,
    ),
    (
        types.MethodType,
        lambda one, other, _: one.__func__ is other.__func__ and one.__self__ is other.__self__,
    ),
    ((nn.Module, types.FunctionType, type), lambda one, other, _: False),
)
"""How to compare two different objects of the same type, by type."""


def _same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    if is_wrapper(one):
        return equal(vars(one), vars(other))
    try:
        return torch.equal(one, other) or (
            one.is_floating_point() and bool(((one == other) | (one.isnan() & other.isnan())).all())
        )
    except (RuntimeError, NotImplementedError):  # For example, sparse tensors can't be compared.
        return False
