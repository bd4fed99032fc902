"""Attention weights that a module computes but does not return.

``nn.MultiheadAttention`` returns its weights where it is asked to, and most models don't ask:
``need_weights=False`` lets it attend in one fused operation. The weights are then had by calling
the module's forward once more, with the arguments that it was just given and ``need_weights=True``.
The pass itself is left alone: its own values stay those of the fused operation, to the last bit.

Other modules that call ``scaled_dot_product_attention`` have no such switch. Their weights never
exist, and the catalogue says so.
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
    "WEIGHTS",
    "Attended",
    "FusedAttention",
    "attended",
    "returns_weights",
]

MOST_BYTES = 256 << 20
"""Bytes of one item's attention weights above which they are not offered."""

FUSED = (
    "it attends in one fused operation (scaled_dot_product_attention), which has no weights to "
    "return; where the model can attend step by step, as with timm's fused_attn=False or "
    "transformers' attn_implementation='eager', build it so and ask for the layer that has them"
)
TOO_LARGE = f"its attention weights are over {MOST_BYTES >> 20} MiB an item at this size of input"

WEIGHTS = "attention_weights"
"""The member of a layer's name that stands for its attention weights, ``[B, heads, L, S]``."""


class Attended:
    """What an attention module returned, and its weights on demand.

    Args:
        module: The module, which has just run.
        args: Its positional arguments.
        kwargs: Its named arguments.
        output: What it returned: its output, and None for the weights.
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
        """Whether there are no weights because they would be more than MOST_BYTES for an item."""
        query, key = self._given["query"], self._given["key"]
        elements = self._module.num_heads * self._length(query) * self._length(key)
        return bool(elements * query.element_size() > MOST_BYTES)

    def _length(self, tokens: torch.Tensor) -> int:
        if tokens.is_nested:  # So torch packs padded tokens: the longest item counts.
            return max(len(item) for item in tokens.unbind())
        # [B, L, E] or [L, B, E]; without a batch [L, E].
        return tokens.shape[1 if self._module.batch_first and tokens.dim() == 3 else 0]

    def weights(self) -> torch.Tensor:
        """Compute the weights ``[B, heads, L, S]``; without a batch ``[heads, L, S]``.

        Of packed tokens, L and S are those of the longest item, and what is after an item's end
        is 0.
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
    """Return a module's output; an `Attended` for an attention module that returned no weights."""
    silent = isinstance(output, tuple) and len(output) == 2 and output[1] is None
    if isinstance(module, nn.MultiheadAttention) and silent and returns_weights(module):
        return Attended(module, args, kwargs, output)
    return output


def returns_weights(module: nn.Module) -> bool:
    """Return whether a module returns its attention weights where it is asked to."""
    return type(module).forward is nn.MultiheadAttention.forward


class FusedAttention(TorchFunctionMode):
    """Calls a function at each fused attention in the block, in this thread."""

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
