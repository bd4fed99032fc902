"""Operations whose result can jump when their argument changes by a rounding error.

Note [Discontinuous steps]
    A compiled program folds batch norms into convolutions, and a shared pass runs kernels for
    another batch size. Both add in another order, so the last bits of values differ. After
    ``topk``, ``argmax``, a comparison or a rounding, that is no longer a small difference: near a
    tie another element is picked, and every value that depends on it is a different one. No sample
    shows this reliably, since ties are rare in random input. So one pass is watched (see
    ``looks``), and values that depend on such a step are left to extractors that run the model's
    own arithmetic.

    Numbers of the input itself are exact, so comparing them, or picking by token ids, is not a
    step. Neither is picking the largest value (``max``, ``topk``'s values), which changes no
    more than its argument does. The dtype shows which results are discrete and can jump: integers
    and booleans that are computed from inexact floating-point numbers. A few operations that return
    floats can jump too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

__all__ = ["discrete_results", "is_new", "keeps_exact"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ROUND = _words(
    "ceil fake_quantize_per_channel_affine_cachemask fake_quantize_per_tensor_affine_cachemask "
    "floor floor_divide fmod frac hardshrink heaviside linear_dynamic linear_relu_dynamic mode "
    "quantized_gru quantized_lstm remainder round sgn sign trunc"
)
"""Operations on floating-point numbers whose floating-point results can jump."""

_NO_STEPS = _words("isfinite isinf isnan isneginf isposinf isreal is_floating_point")
"""These tell infinity and NaN from other numbers, which rounding can't change."""

_NEW = _words(
    "empty_like full_like new_empty new_empty_strided new_full new_ones new_zeros ones_like "
    "rand_like randint_like randn_like zeros_like"
)
"""Operations that use the shape and dtype of their argument, but none of its values."""

_EXACT = _words(
    "_reshape_alias _to_copy _unsafe_view abs alias as_strided cat chunk clamp clamp_max "
    "clamp_min clone constant_pad_nd contiguous copy_ detach diagonal embedding expand fill "
    "flatten flip gather index index_select lift_fresh masked_fill masked_select "
    "max_pool2d_with_indices max min maximum minimum narrow nan_to_num neg permute "
    "pixel_shuffle relu repeat reshape roll select select_scatter slice slice_scatter split "
    "split_with_sizes squeeze stack swapaxes t tile to topk transpose tril triu unbind unfold "
    "unsqueeze unsqueeze_ view where"
)
"""Operations that move numbers or pick some of them, but compute no new ones."""


def _name(func: Any) -> str:
    name: str = func.overloadpacket.__name__
    return name


def is_new(func: Any) -> bool:
    """Return whether an operation's result does not depend on the values of its arguments."""
    return _name(func) in _NEW


def keeps_exact(func: Any) -> bool:
    """Return whether an operation's result is exact if its arguments are."""
    name = _name(func)
    # In-place operations end in an underscore; `copy_` is one of its own.
    return name in _EXACT or name.removesuffix("_") in _EXACT


def discrete_results(func: Any, args: Any, result: Any) -> Iterator[torch.Tensor]:
    """Yield the results of an operation that can jump when an inexact argument changes slightly.

    Args:
        func: The operation.
        args: Its arguments, at least one of them inexact.
        result: Its result.
    """
    name = _name(func)
    if name in _NO_STEPS or _compares_with_itself(name, args):
        return
    rounds = name.removesuffix("_") in _ROUND or func is torch.ops.aten.div.Tensor_mode
    for leaf in tree_leaves(result):
        if isinstance(leaf, torch.Tensor) and (rounds or _is_discrete(leaf)):
            yield leaf


def _is_discrete(value: torch.Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex())


def _compares_with_itself(name: str, args: Any) -> bool:
    """Return whether a comparison tests for NaN (``x == x``) or infinity, as ``isfinite`` does."""
    if name not in ("eq", "ne") or len(args) != 2:
        return False
    first, second = args
    infinite = isinstance(second, float) and abs(second) == float("inf")
    return second is first or infinite
