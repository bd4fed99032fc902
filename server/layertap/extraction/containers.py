"""Containers of tensors as named tensors: tuples by index, mappings and dataclasses by key.

Some tensors can't be sent as they are. ``plain`` returns the tensor to send in place of a value,
and ``unsendable`` says why a value can't be sent at all.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from layertap.extraction.attention import WEIGHTS, Attended
from layertap.models.tensor_content import is_wrapper
from layertap.wire.dtypes import DTYPES

__all__ = ["flatten", "pick", "plain", "replaced", "unsendable"]

_SENT = {getattr(torch, row.name) for row in DTYPES}

MAX_CONTAINER_DEPTH = 8


def flatten(value: Any, depth: int = 0) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """Yield (keys that lead to the tensor, tensor) for every tensor in ``value``, in order.

    A plain tensor yields itself without keys. Values that hold no tensor yield nothing.
    Containers nested more than MAX_CONTAINER_DEPTH levels deep are ignored.
    """
    if isinstance(value, torch.Tensor):
        yield (), value
    elif depth < MAX_CONTAINER_DEPTH:
        for key, member in _members(value):
            for way, tensor in flatten(member, depth + 1):
                yield (key, *way), tensor


def pick(value: Any, way: tuple[str, ...]) -> torch.Tensor | None:
    """Return the tensor that the keys in ``way`` lead to, or None if there is none."""
    for step in way:
        if isinstance(value, Attended) and step != WEIGHTS:
            value = value.output  # The weights are computed only if they are requested.
        value = dict(_members(value)).get(step)
    return value if isinstance(value, torch.Tensor) else None


def replaced(value: Any, way: tuple[str, ...], tensor: torch.Tensor) -> Any:
    """Return a value with another tensor where the keys in ``way`` lead to.

    Containers on the way are copied, so those who have the former value don't see the change.

    Raises:
        TypeError: If a container on the way can't be copied with another member.
    """
    if isinstance(value, Attended):
        # What the module returned; the weights are not part of it.
        return replaced(value.output, way, tensor)
    if not way:
        return tensor
    key, *rest = way
    member = replaced(dict(_members(value))[key], tuple(rest), tensor)
    if isinstance(value, Mapping):
        own = next(each for each, name, _ in _keys(value) if name == key)
        changed = copy.copy(value)
        changed[own] = member  # type: ignore[index]
        return changed
    if isinstance(value, tuple) and hasattr(value, "_replace"):
        return value._replace(**{key: member})
    if isinstance(value, tuple | list):
        index = _index(value, key)
        members = [*value[:index], member, *value[index + 1 :]]
        return type(value)(members)
    changed = copy.copy(value)
    object.__setattr__(changed, key, member)
    return changed


def _index(value: Sequence[Any], key: str) -> int:
    # A tuple with named fields, such as those of torch's functions, has their names as keys.
    return [name for name, _ in _members(value)].index(key)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor to send for a value: detached, and dequantised if it is quantised."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.dequantize() if tensor.is_quantized else tensor


def unsendable(tensor: torch.Tensor) -> str:
    """Return why a tensor can't be sent; empty if what ``plain`` returns for it can be sent."""
    reason = _not_dense(tensor)
    if reason or tensor.dtype in _SENT or tensor.is_quantized:
        return reason
    return f"its value is {_name(tensor.dtype)}, a dtype that layertap can't return"


def _not_dense(tensor: torch.Tensor) -> str:
    """Return why a tensor has no memory with an element at each place; empty if it has."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return (
            "its value is a tensor of torch.vmap or torch.func.grad, which has no meaning outside "
            "the function"
        )
    if tensor.device.type == "meta":
        return "its value is a tensor on the meta device, which has a shape but no elements"
    if tensor.is_nested:
        return "its value is a nested tensor, whose items differ in size"
    if is_wrapper(tensor):
        return (
            f"its value is a {type(tensor).__name__}, which holds other tensors in place of memory "
            f"of its own"
        )
    if tensor.layout is not torch.strided:
        return f"its value is a sparse tensor ({_name(tensor.layout)})"
    return ""


def _name(value: torch.dtype | torch.layout) -> str:
    return str(value).removeprefix("torch.")


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Attended):
        yield from _members(value.output)
        if not value.withheld:
            yield WEIGHTS, value.weights()
    elif isinstance(value, Mapping):
        yield from ((name, member) for _, name, member in _keys(value))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        yield from ((str(index), member) for index, member in enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in fields(value))


def _keys(value: Mapping[Any, Any]) -> Iterator[tuple[Any, str, Any]]:
    """Yield each key of a mapping with its name and its member.

    A key's name is its text, or its ``repr`` if another key has this text, as 1 and ``"1"`` have.
    Keys that differ in neither have no name of their own and are left out.
    """
    texts = Counter(map(str, value))
    names = [str(key) if texts[str(key)] == 1 else repr(key) for key in value]
    often = Counter(names)
    for (key, member), name in zip(value.items(), names, strict=True):
        if often[name] == 1:
            yield key, name, member
