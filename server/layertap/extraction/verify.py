"""Compares an extractor's values with the reference."""

from __future__ import annotations

import math

import torch

from layertap.extraction.tf32 import tf32_allowed

__all__ = ["COMPILED_TOLERANCE", "compiled_tolerance", "difference", "mismatch", "same"]

COMPILED_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}
"""Largest error of a compiled plan as a share of the layer's largest magnitude, by dtype.

Folding batch norms into convolutions reorders arithmetic. In float32 the measured error is 1e-6 on
resnet18 and about 1e-5 on very deep models. A wrong plan is off by 1e-1 or more.
"""

TF32_TOLERANCE = 5e-3
"""The same for float32 on a CUDA device if TF32 is allowed; see Note [TF32]."""

_PIECE = 1 << 22


def compiled_tolerance(reference: torch.Tensor) -> float:
    """Return how far a compiled plan's value may be from the eager model's.

    Args:
        reference: The eager model's value, on the device that computed it.

    Returns:
        The largest allowed error as a share of the value's largest magnitude; 0.0 for types that
        are not floating point, which must be equal.
    """
    if reference.is_cuda and reference.dtype == torch.float32 and tf32_allowed():
        return TF32_TOLERANCE
    return COMPILED_TOLERANCE.get(reference.dtype, 0.0)


def difference(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest error as a share of the reference's largest magnitude.

    It is infinite if shape, dtype or the positions of non-finite values differ; 0.0 if all is
    equal.
    """
    if value.shape != reference.shape or value.dtype != reference.dtype:
        return float("inf")
    if torch.equal(value, reference):
        return 0.0
    if not reference.is_floating_point():
        return float("inf")
    error = scale = 0.0
    for mine, true in zip(_pieces(value), _pieces(reference), strict=True):
        expected = true.double()
        largest = (mine.double() - expected).abs().max().item()
        if not math.isfinite(largest):
            return _difference_where_finite(value, reference)
        error = max(error, largest)
        scale = max(scale, expected.abs().max().item())
    return error / scale if scale else float("inf")


def _difference_where_finite(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Do the same as ``difference`` for tensors that hold NaN or infinity, which takes longer."""
    if same(value, reference):
        return 0.0
    error = scale = 0.0
    for mine, true in zip(_pieces(value), _pieces(reference), strict=True):
        finite = torch.isfinite(true)
        if not torch.equal(finite, torch.isfinite(mine)) or not same(mine[~finite], true[~finite]):
            return float("inf")
        if finite.any():
            expected = true[finite].double()
            error = max(error, (mine[finite].double() - expected).abs().max().item())
            scale = max(scale, expected.abs().max().item())
    return error / scale if scale else float("inf")


def mismatch(value: torch.Tensor, reference: torch.Tensor, tolerance: float) -> str:
    """Return how a value differs from the reference, in words; empty if it is close enough.

    Args:
        value: The value to check.
        reference: The reference value.
        tolerance: The largest allowed error, as a share of the reference's largest magnitude.
    """
    if value.shape != reference.shape:
        return f"its shape is {list(value.shape)}, the model's is {list(reference.shape)}"
    if value.dtype != reference.dtype:
        return f"its type is {value.dtype}, the model's is {reference.dtype}"
    error = difference(value, reference)
    if error <= tolerance:
        return ""
    return f"its value differs from the model's {_how(value, reference, error, tolerance)}"


def _how(value: torch.Tensor, reference: torch.Tensor, error: float, tolerance: float) -> str:
    if error < float("inf"):
        return f"by {error:.1e} of the largest magnitude (allowed: {tolerance:.0e})"
    if not reference.is_floating_point():
        return f"in {int((value != reference).sum())} of {reference.numel()} elements"
    if torch.equal(value.isfinite(), reference.isfinite()):
        return "where the model's is zero everywhere"
    return "in which elements are NaN or infinite"


def _pieces(value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split a large tensor along its first dimension, so that copying it takes little memory."""
    if value.numel() <= _PIECE:
        return (value,)
    return tuple(value.split(max(1, _PIECE * len(value) // value.numel())))


def same(value: torch.Tensor, reference: torch.Tensor) -> bool:
    """Return whether two tensors are equal in shape, dtype and every element, NaN equal to NaN."""
    if value.shape != reference.shape or value.dtype != reference.dtype:
        return False
    if torch.equal(value, reference):
        return True
    return value.is_floating_point() and bool(
        ((value == reference) | (value.isnan() & reference.isnan())).all()
    )
