"""When an extractor's value counts as the oracle's."""

from __future__ import annotations

import torch

__all__ = ["TORCHSCRIPT_TOLERANCE", "difference", "same"]

TORCHSCRIPT_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}
"""Largest error of a compiled plan as a share of the layer's largest magnitude.

Folding batch norms into convolutions reorders arithmetic; measured on resnet18 in float32 the error
is 1e-6, on very deep models some 1e-5. A wrong plan is off by 1e-1 and more.
"""


def difference(value: torch.Tensor, oracle: torch.Tensor) -> float:
    """Return the largest error as a share of the oracle's largest magnitude.

    Infinite where shape, dtype or the places of non-finite values differ; 0.0 where all is equal.
    """
    if value.shape != oracle.shape or value.dtype != oracle.dtype:
        return float("inf")
    if same(value, oracle):
        return 0.0
    if not oracle.is_floating_point():
        return float("inf")
    finite = torch.isfinite(oracle)
    if not torch.equal(finite, torch.isfinite(value)) or not same(value[~finite], oracle[~finite]):
        return float("inf")
    error = (value[finite].double() - oracle[finite].double()).abs().max().item()
    scale = oracle[finite].double().abs().max().item()
    return error / scale if scale else float("inf")


def same(value: torch.Tensor, oracle: torch.Tensor) -> bool:
    """Tell whether two tensors are equal in shape, dtype and every element, NaN equal to NaN."""
    if value.shape != oracle.shape or value.dtype != oracle.dtype:
        return False
    if torch.equal(value, oracle):
        return True
    return value.is_floating_point() and bool(
        ((value == oracle) | (value.isnan() & oracle.isnan())).all()
    )
