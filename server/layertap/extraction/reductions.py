"""What can be done to a captured value before it is sent: on shapes, and on tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from layertap.errors import InvalidInputError
from layertap.extraction.points import Dim, ValueSpec
from layertap.selection import Reduction

__all__ = ["reduce_spec", "reduce_value"]

Dims = tuple[Dim, ...]


@dataclass(frozen=True)
class _Rule:
    """A reduction: which ranks it takes, what it makes of a shape, and of a tensor."""

    takes: str
    fits: Callable[[Dims], bool]
    shape: Callable[[Dims], Dims]
    value: Callable[[torch.Tensor], torch.Tensor]


def _grid_side(tokens: int) -> tuple[int, int]:
    """Return (tokens in front, side of the square grid) for N tokens; side 0 where none fits.

    timm and torchvision put one class token in front of the patch tokens; a ViT without one has
    a square number of tokens itself.
    """
    for front in (0, 1):
        side = math.isqrt(tokens - front)
        if side and side * side == tokens - front:
            return front, side
    return 0, 0


def _grid_shape(dims: Dims) -> Dims:
    _, side = _grid_side(dims[1].size)
    return (dims[0], dims[2], Dim(side), Dim(side))


def _grid_value(value: torch.Tensor) -> torch.Tensor:
    front, side = _grid_side(value.shape[1])
    patches: torch.Tensor = value[:, front:].transpose(1, 2)
    return patches.reshape(*patches.shape[:2], side, side)


_RULES = {
    Reduction.GLOBAL_AVERAGE_POOL: _Rule(
        "[B, C, ...] with a spatial dimension, of a floating-point type",
        lambda dims: len(dims) >= 3,
        lambda dims: dims[:2],
        lambda value: value.flatten(2).mean(2),
    ),
    Reduction.FLATTEN: _Rule(
        "[B, ...]",
        lambda dims: len(dims) >= 2,
        lambda dims: (dims[0], Dim(math.prod(dim.size for dim in dims[1:]))),
        lambda value: value.flatten(1),
    ),
    Reduction.CLASS_TOKEN: _Rule(
        "[B, N, C]",
        lambda dims: len(dims) == 3 and dims[1].size > 0,
        lambda dims: (dims[0], dims[2]),
        lambda value: value[:, 0],
    ),
    Reduction.TOKEN_GRID: _Rule(
        "[B, N, C] with N or N - 1 a square number",
        lambda dims: len(dims) == 3 and _grid_side(dims[1].size)[1] > 0,
        _grid_shape,
        _grid_value,
    ),
}


def reduce_spec(spec: ValueSpec, reduction: Reduction, layer: str) -> ValueSpec:
    """Return the type and shape of a value after a reduction.

    Raises:
        InvalidInputError: Where the reduction can't be applied to such a value.
    """
    if reduction is Reduction.NONE:
        return spec
    rule = _RULES[reduction]
    average = reduction is Reduction.GLOBAL_AVERAGE_POOL
    batched = bool(spec.dims) and spec.dims[0].batch and not any(d.batch for d in spec.dims[1:])
    if (
        spec.dynamic
        or not batched
        or not rule.fits(spec.dims)
        or (average and not spec.dtype.is_floating_point)
    ):
        shape = [f"{dim.size}B" if dim.batch else dim.size for dim in spec.dims]
        raise InvalidInputError(
            f"reduction: {reduction.name} takes {rule.takes}, but layer {layer!r} is "
            f"{spec.dtype} {shape}"
        )
    return ValueSpec(spec.dtype, rule.shape(spec.dims))


def reduce_value(value: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """Apply a reduction to a value whose spec ``reduce_spec`` accepted."""
    return value if reduction is Reduction.NONE else _RULES[reduction].value(value)
