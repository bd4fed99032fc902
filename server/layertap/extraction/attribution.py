"""Methods that make something of a gradient: a product with the value, or a class activation map.

Eigen-CAM is made of the value alone, so any extractor serves it.

A map needs to know which dimensions are channels and which are the image's. That comes from the
catalogue, so tokens and ``[B, H, W, C]`` need nothing from the caller. Maps keep their sign.

Sources: Grad-CAM, Selvaraju et al. 2017 (arXiv:1610.02391); HiResCAM, Draelos and Carin 2020
(arXiv:2011.08891); LayerCAM, Jiang et al. 2021 (doi:10.1109/TIP.2021.3089943); Grad-CAM++,
Chattopadhay et al. 2018 (arXiv:1710.11063), equation 19; Eigen-CAM, Muhammad and Yeasin 2020
(arXiv:2008.00299).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from layertap.extraction.points import ValueSpec
from layertap.extraction.reductions import Reduced, reduced
from layertap.models import BatchKey
from layertap.selection import Method, Reduction

__all__ = ["Attribution", "attribution", "eigen_cam"]

Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes (activation, gradient), both ``[B, ...]``."""


@dataclass(frozen=True, slots=True)
class Attribution:
    """What a method makes of a value and its gradient.

    Attributes:
        spec: The resulting dtype and shape.
        needs_value: Whether it needs the value, and not the gradient alone.
        combine: Returns the result for a value and its gradient, in the layout of the value.
    """

    spec: ValueSpec
    needs_value: bool
    combine: Combine


def attribution(method: Method, spec: ValueSpec, layer: str, key: BatchKey) -> Attribution:
    """Return what a method makes of a layer's gradient.

    Args:
        method: The method.
        spec: The dtype, shape and layout of the layer's value.
        layer: The layer's name, for the error message.
        key: The shapes of the batch's items, for the error message.

    Raises:
        InvalidInputError: If the method needs a grid, and the layer has none that is known.
    """
    if method in (Method.GRADIENT, Method.GUIDED_BACKPROPAGATION) or method.sweeps:
        return Attribution(spec, needs_value=False, combine=lambda value, gradient: gradient)
    if method is Method.GRADIENT_X_ACTIVATION:
        return Attribution(spec, needs_value=True, combine=torch.mul)
    grid = reduced(spec, Reduction.TOKEN_GRID, layer, key, asked=f"method: {method.name}")
    weigh = _MAPS[method]

    def combine(value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        # Half precision would lose small gradients in the sums.
        wide = torch.promote_types(value.dtype, torch.float32)
        value, gradient = grid.apply(value).to(wide), grid.apply(gradient).to(wide)
        return (weigh(value, gradient) * value).sum(1).to(spec.dtype)

    dims = (grid.spec.dims[0], *grid.spec.dims[2:])
    return Attribution(ValueSpec(spec.dtype, dims), needs_value=True, combine=combine)


def eigen_cam(spec: ValueSpec, layer: str, key: BatchKey) -> Reduced:
    """Return what makes the Eigen-CAM of a layer's value.

    At each place of the grid it is the value's channels times the first right singular vector of
    the matrix with a row for each place and a column for each channel, as in the paper: the
    channels are not centred. A singular vector has no sign of its own; that of a map is the one for
    which its sum is not negative. The map of an item with NaN or infinity is NaN.

    Raises:
        InvalidInputError: If the layer has no grid that is known.
    """
    grid = reduced(spec, Reduction.TOKEN_GRID, layer, key, asked=f"method: {Method.EIGEN_CAM.name}")
    dims = (grid.spec.dims[0], *grid.spec.dims[2:])

    def apply(value: torch.Tensor) -> torch.Tensor:
        value = grid.apply(value.detach())
        rows = value.flatten(2).transpose(1, 2).to(torch.float64)
        finite = rows.isfinite().all((1, 2))
        rows = rows.where(finite[:, None, None], torch.zeros_like(rows))
        found = torch.stack([_first_component(item) for item in rows])
        found = found * torch.where(found.sum(1, keepdim=True) < 0, -1.0, 1.0)
        found = found.where(finite[:, None], torch.full_like(found, torch.nan))
        maps: torch.Tensor = found.unflatten(1, value.shape[2:]).to(spec.dtype)
        return maps

    return Reduced(ValueSpec(spec.dtype, dims), apply)


def _first_component(rows: torch.Tensor) -> torch.Tensor:
    """Return a matrix ``[N, C]`` times its first right singular vector.

    That is the eigenvector of the smaller of the two Gram matrices, which takes far less time than
    a singular value decomposition.
    """
    tall = rows.shape[0] > rows.shape[1]
    gram = torch.linalg.eigh(rows.T @ rows if tall else rows @ rows.T)
    first: torch.Tensor = gram.eigenvectors[:, -1]
    return rows @ first if tall else first * gram.eigenvalues[-1].clamp(min=0).sqrt()


def _mean_gradient(value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.mean(_grid_of(gradient), keepdim=True)


def _gradient(value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient


def _positive_gradient(value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.relu()


def _weighted_gradient(value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    # g² / (2 g² + S g³) with S the sum of a channel's values, which is 1 / (2 + S g) unless g is 0.
    below = 2 + value.sum(_grid_of(value), keepdim=True) * gradient
    used = (gradient > 0) & (below != 0)
    weights = torch.where(used, gradient / below, 0)
    return weights.sum(_grid_of(value), keepdim=True)


def _grid_of(value: torch.Tensor) -> tuple[int, ...]:
    """Return the dimensions after batch and channels."""
    return tuple(range(2, value.dim()))


_MAPS: dict[Method, Combine] = {
    Method.GRAD_CAM: _mean_gradient,
    Method.HIRES_CAM: _gradient,
    Method.LAYER_CAM: _positive_gradient,
    Method.GRAD_CAM_PLUS_PLUS: _weighted_gradient,
}
"""The weights of a map's channels or elements, ``[B, C, ...]``, by method."""
