"""Reductions of captured values.

Experiments have shown which dimensions are channels and which are the image's; see
``layertap.extraction.grid``. The mean over the wrong dimensions would be a silent wrong answer, so
a reduction is refused if the layout is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from layertap.errors import InvalidInputError
from layertap.extraction.layout import Geometry, Layout
from layertap.extraction.masked import MASKED, Tokens, masked
from layertap.extraction.points import Dim, ValueSpec
from layertap.models import BatchKey
from layertap.selection import Reduction

__all__ = ["Reduced", "chained", "reduced"]

Apply = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Reduced:
    """A reduction of one layer: the resulting dtype and shape, and the function that applies it."""

    spec: ValueSpec
    apply: Apply


def chained(steps: Sequence[Reduced]) -> Reduced:
    """Return several steps, of which each one takes what the one before it made, as one."""
    if len(steps) == 1:
        return steps[0]

    def apply(value: torch.Tensor) -> torch.Tensor:
        for step in steps:
            value = step.apply(value)
        return value

    return Reduced(steps[-1].spec, apply)


def reduced(
    spec: ValueSpec,
    reduction: Reduction,
    layer: str,
    key: BatchKey,
    tokens: Tokens | None = None,
    *,
    asked: str = "",
) -> Reduced:
    """Return a reduction for the values of a layer.

    Args:
        spec: The dtype and shape of the values.
        reduction: Which reduction.
        layer: The layer's name, for the error message.
        key: The shapes of the batch's items, for the error message.
        tokens: Which positions of the batch's texts count; None if all do.
        asked: What the caller asked for, for the error message; empty if it is the reduction.

    Raises:
        InvalidInputError: If the reduction can't be applied to such values.
    """
    if reduction is Reduction.NONE:
        return Reduced(spec, _same)
    takes, make = _RULES[reduction]
    front = _batch_in_front(spec)
    made = None
    if front is not None and not spec.dynamic:
        made = make(front, spec.geometry)
        if reduction in MASKED and _is_series(front):
            made = masked(reduction, front, tokens, layer)
    if front is None or made is None:
        shape = [f"{dim.size}B" if dim.batch else dim.size for dim in spec.dims]
        known = "" if spec.geometry != Geometry() else " (of unknown layout)"
        raise InvalidInputError(
            f"{asked or f'reduction: {reduction.name}'} takes {takes}, but layer {layer!r} is "
            f"{spec.dtype} {shape}{known} for items of {key}"
        )
    dims, apply = made
    if reduction.ragged:
        # Its first dimension is not the batch.
        return Reduced(ValueSpec(spec.dtype, tuple(dims)), _in_front(apply, spec))
    grid = _grid_of(dims) if reduction is Reduction.TOKEN_GRID else Geometry()
    result = ValueSpec(spec.dtype, (front.dims[0], *dims), geometry=grid)
    return Reduced(result, _in_front(apply, spec))


def _in_front(apply: Apply, spec: ValueSpec) -> Apply:
    """Return a function that moves the batch dimension to the front and then applies another."""
    axis = next(index for index, dim in enumerate(spec.dims) if dim.batch)
    return apply if axis == 0 else lambda value: apply(value.movedim(axis, 0))


def _grid_of(dims: Sequence[Dim]) -> Geometry:
    """Return the geometry of a grid ``[B, C, (T,) H, W]``, given all dimensions but the batch."""
    sizes = [dim.size for dim in dims]
    return Geometry(Layout.CHANNELS_FIRST, sizes[0], sizes[-2], sizes[-1])


def _is_series(front: ValueSpec) -> bool:
    """Return whether values are ``[B, L, C]`` with one row for each position of the input."""
    return len(front.dims) == 3 and front.geometry.positions == (1,)


Made = tuple[Sequence[Dim], Apply] | None


def _batch_in_front(spec: ValueSpec) -> ValueSpec | None:
    """Return the spec with its batch dimension first; None if an item is not one row of it."""
    axis = spec.batch_axis
    if axis is None or axis[1] != 1:
        return None
    others = spec.dims[: axis[0]] + spec.dims[axis[0] + 1 :]
    return replace(spec, dims=(spec.dims[axis[0]], *others))


def _same(value: torch.Tensor) -> torch.Tensor:
    return value


def _average_pool(spec: ValueSpec, shape: Geometry) -> Made:
    if len(spec.dims) < 3 or not spec.dtype.is_floating_point:
        return None
    match shape.layout:
        case Layout.TOKENS:
            return [Dim(shape.channels)], lambda value: value[:, shape.front :].mean(1)
        case Layout.CHANNELS_LAST:
            return [Dim(shape.channels)], lambda value: value.flatten(1, -2).mean(1)
        case Layout.CHANNELS_FIRST:
            return spec.dims[1:2], lambda value: value.flatten(2).mean(2)
        case _:
            return _average_over(spec, shape.positions)


def _average_over(spec: ValueSpec, positions: tuple[int, ...]) -> Made:
    rest = [dim for axis, dim in enumerate(spec.dims) if axis and axis not in positions]
    if not positions or len(rest) != 1:
        return None
    return rest, lambda value: value.mean(positions)


def _flatten(spec: ValueSpec, _: Geometry) -> Made:
    if len(spec.dims) < 2:
        return None
    return [Dim(math.prod(dim.size for dim in spec.dims[1:]))], lambda value: value.flatten(1)


def _class_token(spec: ValueSpec, shape: Geometry) -> Made:
    # If the patches alone fill the grid, there is no class token: the first token is a patch.
    bare = shape.layout is Layout.TOKENS and not shape.front
    tokens = shape.layout is Layout.TOKENS or shape.positions == (1,)
    if len(spec.dims) != 3 or not spec.dims[1].size or bare or not tokens:
        return None
    return spec.dims[2:], lambda value: value[:, 0]


def _token_grid(spec: ValueSpec, shape: Geometry) -> Made:
    height, width = shape.height, shape.width

    def rows(value: torch.Tensor) -> torch.Tensor:
        patches = value[:, shape.front :].transpose(1, 2)
        return patches.reshape(*patches.shape[:2], height, width)

    match shape.layout:
        case Layout.TOKENS:
            return [Dim(shape.channels), Dim(height), Dim(width)], rows
        case Layout.CHANNELS_LAST:
            return [spec.dims[-1], *spec.dims[1:-1]], lambda value: value.movedim(-1, 1)
        case Layout.CHANNELS_FIRST:
            return spec.dims[1:], _same
        case _:
            return None


def _only_series(spec: ValueSpec, shape: Geometry) -> Made:
    """Return None: of values that are no tokens of texts there is no such reduction."""
    return None


_RULES: dict[Reduction, tuple[str, Callable[[ValueSpec, Geometry], Made]]] = {
    Reduction.GLOBAL_AVERAGE_POOL: (
        "[B, C, H, W], [B, H, W, C], patch tokens [B, N, C] or a series ([B, T, C] or [B, C, T]) "
        "of a floating-point type",
        _average_pool,
    ),
    Reduction.FLATTEN: ("[B, ...]", _flatten),
    Reduction.CLASS_TOKEN: ("[B, N, C] with more tokens than patches", _class_token),
    Reduction.LAST_TOKEN: ("the tokens of texts, [B, L, C]", _only_series),
    Reduction.TOKEN_MAX: ("the tokens of texts, [B, L, C]", _only_series),
    Reduction.TOKENS: ("the tokens of texts, [B, L, C]", _only_series),
    Reduction.WORDS: ("the tokens of texts, [B, L, C]", _only_series),
    Reduction.TOKEN_GRID: ("patch tokens [B, N, C], [B, H, W, C] or [B, C, H, W]", _token_grid),
}
