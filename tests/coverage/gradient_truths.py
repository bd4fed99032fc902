"""The true gradients of layers, found without layertap: the reference of ``prove_gradients.py``.

Note [How the reference knows]
    A zero is added to what a module returned, or was given, and the gradient with respect to that
    zero is the gradient of the value at that moment. The zero is a leaf of the graph which only
    this file holds, so nothing that the model does later can change what its gradient means, and
    the model goes on with the sum, which no other value shares memory with. Modules do not work in
    place here; an in-place operation in the code of a ``forward`` changes such a sum at most.

    Two things show that this is the model's own gradient. The reference returns what the unchanged
    module returns. And ``derivative`` asks the unchanged module, with its in-place modules and
    without autograd: it moves a layer's value a little to either side and looks at the score.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import allow_mutation_on_saved_tensors

__all__ = ["Place", "Truth", "changed", "derivative", "find", "gradients"]


class Place(NamedTuple):
    """One value of a pass.

    Attributes:
        path: The module.
        side: ``"input"`` or ``"output"``.
        call: Which call of the module.
        member: The keys that lead to a tensor in a container.
    """

    path: str
    side: str
    call: int
    member: tuple[str, ...]


class Truth(NamedTuple):
    """What the reference found.

    Attributes:
        result: What the model returned, detached.
        gradients: The gradient of the score with respect to each value; None where the score does
            not depend on it.
    """

    result: Any
    gradients: dict[Place, torch.Tensor | None]


Run = Callable[[nn.Module], Any]
"""Runs a model on the batch in question."""

Score = Callable[[Any], torch.Tensor]
"""Makes one number of what the model returned."""

Change = Callable[[torch.Tensor], torch.Tensor]


def gradients(net: nn.Module, run: Run, places: Collection[Place], score: Score) -> Truth:
    """Return the gradients of a score with respect to values; see Note [How the reference knows].

    Args:
        net: A fresh module, whose ``inplace`` flags are cleared.
        run: Runs it.
        places: The values.
        score: The score.
    """
    for module in net.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    try:
        return _gradients(net, run, places, score, keep=False)
    except RuntimeError as error:
        # Code such as ``y = x.sigmoid(); y.mul_(2)`` has no gradient in plain PyTorch.
        if "modified by an inplace operation" not in str(error):
            raise
        return _gradients(net, run, places, score, keep=True)


def _gradients(
    net: nn.Module, run: Run, places: Collection[Place], score: Score, *, keep: bool
) -> Truth:
    zeros: dict[Place, torch.Tensor] = {}

    def change(place: Place) -> Change:
        def add(value: torch.Tensor) -> torch.Tensor:
            if not value.is_floating_point():
                return value  # The layer's dtype depends on the input.
            zeros[place] = torch.zeros_like(value, requires_grad=True)
            return value + zeros[place]

        return add

    keeping = allow_mutation_on_saved_tensors() if keep else nullcontext()
    # Of a value that is computed without gradients, the zero leads nowhere.
    with torch.enable_grad(), keeping:
        result = changed(net, run, {place: change(place) for place in places})
        total = score(result)
        found: tuple[torch.Tensor | None, ...] = (None,) * len(zeros)
        if zeros and total.requires_grad:
            found = torch.autograd.grad(total, list(zeros.values()), allow_unused=True)
    known = dict(zip(zeros, found, strict=True))
    return Truth(_detached(result), {place: known.get(place) for place in places})


def derivative(
    net: nn.Module,
    run: Run,
    place: Place,
    score: Score,
    direction: torch.Tensor,
    *,
    by: float = 1e-6,
) -> tuple[float, torch.Tensor, float]:
    """Return the derivative of a score in a direction of a value, by a central difference.

    Elements that are exactly zero are not moved: a ReLU has left them, and the sum of two of them
    stands in the kink of the next one, where a difference says nothing.

    Args:
        net: A fresh module.
        run: Runs it.
        place: The value.
        score: The score.
        direction: The direction, of the value's shape.
        by: The largest movement of an element, relative to the largest magnitude of the value.

    Returns:
        The derivative, the direction without these elements, and how much of the derivative may be
        the rounding of the score.
    """
    step, used = 0.0, direction

    def at(sign: float) -> float:
        def move(value: torch.Tensor) -> torch.Tensor:
            nonlocal step, used
            used = direction * (value != 0)
            largest = float(used.abs().max()) or 1.0
            step = by * max(1e-3, float(value.abs().max())) / largest
            return value + sign * step * used

        with torch.no_grad():
            return float(score(changed(net, run, {place: move})))

    more, less = at(1.0), at(-1.0)
    rounding = 4 * torch.finfo(torch.float64).eps * max(abs(more), abs(less))
    return (more - less) / (2 * step), used, rounding / (2 * step)


def changed(net: nn.Module, run: Run, changes: Mapping[Place, Change]) -> Any:
    """Run a module with values replaced at the moment at which a module returns or is given them.

    Returns:
        What it returned.
    """
    calls: dict[tuple[str, str], int] = {}
    wanted: dict[tuple[str, str, int], list[Place]] = {}
    for place in changes:
        wanted.setdefault(place[:3], []).append(place)

    def at(path: str, side: str, value: Any) -> Any:
        call = calls.get((path, side), 0)
        calls[path, side] = call + 1
        for place in wanted.get((path, side, call), ()):
            tensor = find(value, place.member)
            if isinstance(tensor, torch.Tensor):
                value = _replaced(value, place.member, changes[place](tensor))
        return value

    def before(path: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if len(args) == 1 and not kwargs:
                return (at(path, "input", args[0]),), {}
            given = {**{str(index): arg for index, arg in enumerate(args)}, **kwargs}
            given = at(path, "input", given)
            return tuple(given.pop(str(index)) for index in range(len(args))), given

        return hook

    def after(path: str) -> Callable[..., Any]:
        return lambda _, args, output: at(path, "output", output)

    sides = {key[:2] for key in wanted}
    handles = []
    for path, module in net.named_modules():
        if (path, "input") in sides:
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
        if (path, "output") in sides:
            handles.append(module.register_forward_hook(after(path)))
    try:
        return run(net)
    finally:
        for handle in handles:
            handle.remove()


def find(value: Any, member: tuple[str, ...]) -> Any:
    """Return what the keys lead to; None if nothing is there."""
    for key in member:
        value = _members(value).get(key)
    return value


def _members(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {str(key): member for key, member in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if isinstance(value, tuple | list):
        return {str(index): member for index, member in enumerate(value)}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return {}


def _replaced(value: Any, member: tuple[str, ...], tensor: torch.Tensor) -> Any:
    """Return a copy of a container with another tensor in it."""
    if not member:
        return tensor
    key, *rest = member
    inner = _replaced(_members(value)[key], tuple(rest), tensor)
    if isinstance(value, Mapping):
        changed = copy.copy(value)
        changed[next(each for each in value if str(each) == key)] = inner  # type: ignore[index]
        return changed
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return value._replace(**{key: inner})
    if isinstance(value, tuple | list):
        return type(value)([*value[: int(key)], inner, *value[int(key) + 1 :]])
    changed = copy.copy(value)
    object.__setattr__(changed, key, inner)
    return changed


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    for key, member in _members(value).items():
        if isinstance(member, torch.Tensor):
            value = _replaced(value, (key,), member.detach())
    return value
