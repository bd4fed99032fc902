"""Attention weights that a module computes but does not return.

``nn.MultiheadAttention`` returns its weights on request, and most models don't request them: with
``need_weights=False`` it can attend in one fused operation. To get the weights, we call the
module's forward once more, with the arguments that it was just given and ``need_weights=True``.
The pass itself does not change: its values are still those of the fused operation, bit for bit.

Other modules that call ``scaled_dot_product_attention`` have no such switch. Their weights are
never computed, and the catalogue says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = [
    "FUSED",
    "TOO_LARGE",
    "UNUSED",
    "WEIGHTS",
    "Attended",
    "FusedAttention",
    "attended",
    "returns_weights",
]

MOST_BYTES = 256 << 20
"""Bytes of one item's attention weights above which they are not offered to clients."""

FUSED = (
    "it uses fused attention (scaled_dot_product_attention), which returns no weights; if the "
    "model can compute attention step by step (timm: fused_attn=False, transformers: "
    "attn_implementation='eager'), build it that way and request the layer that returns the weights"
)
TOO_LARGE = f"its attention weights are over {MOST_BYTES >> 20} MiB per item at this input size"

UNUSED = "the module does not return its attention weights, so nothing depends on them"

WEIGHTS = "attention_weights"
"""The last part of the name under which a layer offers its attention weights."""


class Attended:
    """The output of an attention module. Computes the attention weights when they are requested.

    Args:
        module: The module, which has just run.
        args: Its positional arguments.
        kwargs: Its named arguments.
        output: What it returned: its output, and None in place of the weights.
    """

    def __init__(
        self,
        module: nn.MultiheadAttention,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: tuple[torch.Tensor, None],
    ) -> None:
        self.output = output
        self._module = module

        self._given = dict(zip(_PARAMETERS, args, strict=False)) | dict(kwargs)

    @property
    def withheld(self) -> bool:
        """Whether the weights are left out because those of one item would exceed MOST_BYTES."""
        query, key = self._given["query"], self._given["key"]
        elements = self._module.num_heads * self._length(query) * self._length(key)
        return bool(elements * query.element_size() > MOST_BYTES)

    def _length(self, tokens: torch.Tensor) -> int:
        if tokens.is_nested:  # torch packs padded tokens like this; the longest item counts.
            return max(len(item) for item in tokens.unbind())
        # [B, L, E] or [L, B, E]; without a batch [L, E].
        return tokens.shape[1 if self._module.batch_first and tokens.dim() == 3 else 0]

    def weights(self) -> torch.Tensor:
        """Compute the weights ``[B, heads, L, S]``; without a batch ``[heads, L, S]``.

        For packed tokens, L and S are the lengths of the longest item, and positions after an
        item's end are 0.
        """
        asked = {**self._given, "need_weights": True, "average_attn_weights": False}
        _, weights = self._module.forward(**asked)
        if weights is None:
            raise AssertionError("nn.MultiheadAttention returns the weights that it is asked for")
        return weights


_PARAMETERS = (
    *("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"),
    *("average_attn_weights", "is_causal"),
)


def attended(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> Any:
    """Return a module's output, as an `Attended` if an attention module returned no weights."""
    silent = isinstance(output, tuple) and len(output) == 2 and output[1] is None
    if isinstance(module, nn.MultiheadAttention) and silent and returns_weights(module):
        return Attended(module, args, kwargs, output)
    return output


def returns_weights(module: nn.Module) -> bool:
    """Return whether a module can return its attention weights on request."""
    return type(module).forward is nn.MultiheadAttention.forward


class FusedAttention(TorchFunctionMode):
    """Calls a function for each fused attention that this thread runs inside the block."""

    def __init__(self, seen: Callable[[], None]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            self._seen()
        return func(*args, **(kwargs or {}))
