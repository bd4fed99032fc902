"""Pads token ids and what belongs to them to another length, and cuts values back.

Note [Lengths in one pass]
    Texts of different lengths can share a forward pass if the shorter ones are padded to the
    longest, and their values are cut back to their own lengths. That is right only if padding does
    not change the values at the other positions. Attention with a mask and causal attention leave
    them as they are; a mean over all positions, a normalisation over time or a convolution that
    reaches into the padding does not. So each layer is tested (see ``padding_proof``).

    Padding is always on the right, where it does not move the tokens to other positions. A request
    whose mask has padding anywhere else is not padded further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from layertap.extraction.points import ValueSpec
from layertap.models import Batch, BatchKey, IdRange, InputSpec, LoadedModel, Mask, free_sizes

__all__ = ["TokenAxis", "cut", "token_axes"]


@dataclass(frozen=True, slots=True)
class TokenAxis:
    """The free dimension of a model's token ids, along which its inputs can be padded.

    Attributes:
        model: The model.
        symbol: The name of the free dimension.
    """

    model: LoadedModel
    symbol: str

    @classmethod
    def of(cls, model: LoadedModel) -> TokenAxis | None:
        """Return the token axis of a model; None if its inputs are no token ids of free length."""
        signature = model.signature
        spec = signature.spec(model.text_inputs[0]) if model.text_inputs else signature.main
        integers = not spec.dtype.is_floating_point and spec.dtype is not torch.bool
        if not integers or len(spec.shape) != 1 or spec.free != (0,):
            return None
        return cls(model, spec.free_names[0])

    def length(self, key: BatchKey) -> int:
        """Return the length of the items of a key; 0 if it has none or several."""
        return (free_sizes(self.model.signature, key) or {}).get(self.symbol, 0)

    def key_of_any_length(self, key: BatchKey) -> BatchKey:
        """Return a key that is equal for batches which differ only in their length."""
        for item in key.items:
            axes = self._axes(item.name)
            shape = [0 if axis + 1 in axes else size for axis, size in enumerate(item.shape)]
            key = key.with_shape(item.name, shape)
        return key

    def padded(self, x: Batch, length: int) -> Batch:
        """Return a batch whose items are padded on the right to a length."""
        return Batch({name: self._pad(name, tensor, length) for name, tensor in x.tensors.items()})

    def shortened(self, x: Batch, length: int) -> Batch:
        """Return views of the first positions of a batch."""
        tensors = dict(x.tensors)
        for name, tensor in x.tensors.items():
            tensors[name] = cut(tensor, self._axes(name), length)
        return Batch(tensors)

    def unmasked(self, x: Batch) -> Batch:
        """Return a batch with masks in which every position counts."""
        tensors = dict(x.tensors)
        for spec in self._masks(x):
            tensors[spec.name] = torch.full_like(tensors[spec.name], 1 - _padding(spec))
        return Batch(tensors)

    def pads_on_the_right(self, x: Batch) -> bool:
        """Return whether the masks of a batch have padding only after all tokens of an item.

        Args:
            x: The batch, on the CPU.
        """
        for spec in self._masks(x):
            mask = x[spec.name]
            if mask.ndim != 2 or mask.dtype is torch.bfloat16:
                return False
            counts = mask.numpy() != _padding(spec)
            if not counts[:, 0].all() or (counts[:, 1:] > counts[:, :-1]).any():
                return False
        return True

    def mask_names(self) -> set[str]:
        """Return the names of the inputs that say which positions count."""
        return {spec.name for spec in self.model.signature.inputs if isinstance(spec.values, Mask)}

    def rows(self, x: Batch, rows: np.ndarray, length: int) -> Batch:
        """Return copies of some items of a batch on the CPU, cut to a length."""
        return Batch(
            {
                name: torch.from_numpy(tensor.numpy()[rows])
                for name, tensor in self.shortened(x, length).tensors.items()
            }
        )

    def _masks(self, x: Batch) -> list[InputSpec]:
        specs = self.model.signature.inputs
        return [s for s in specs if s.name in x and isinstance(s.values, Mask)
                and self._axes(s.name)]  # fmt: skip

    def _axes(self, name: str) -> tuple[int, ...]:
        """Return the dimensions of an input's batch that have the length."""
        dimensions = self.model.signature.spec(name).dimensions
        return tuple(axis + 1 for axis, (_, free) in enumerate(dimensions) if free == self.symbol)

    def _pad(self, name: str, tensor: torch.Tensor, length: int) -> torch.Tensor:
        axes = self._axes(name)
        missing = [length - size if axis in axes else 0 for axis, size in enumerate(tensor.shape)]
        if not any(missing):
            return tensor
        # Counted from the last dimension, the elements before and after.
        widths = [width for more in reversed(missing) for width in (0, more)]
        return functional.pad(tensor, widths, value=self._fill(name))

    def _fill(self, name: str) -> int:
        model = self.model
        if name in model.text_inputs and model.tokenizer is not None:
            return model.tokenizer.padding
        values = model.signature.spec(name).values
        return values.padding if isinstance(values, IdRange | Mask) else 0


def _padding(spec: InputSpec) -> int:
    return spec.values.padding if isinstance(spec.values, Mask) else 0


def token_axes(spec: ValueSpec, symbol: str) -> tuple[int, ...] | str:
    """Return the dimensions of a value that have the length of the items, such as 1 and 2.

    Returns:
        Why such a value can't be cut to an item's own length, if it can't.
    """
    if spec.dynamic or spec.batch_axis is None:
        return "its values can't be divided into items"
    axes = []
    for axis, dim in enumerate(spec.dims):
        if dim.expression is None:
            return "its shape does not follow from the sizes of the input"
        if symbol not in dim.expression.symbols:
            continue
        if dim.batch or str(dim.expression) != symbol:
            return f"it has no row for each token, but {dim.expression} of them"
        axes.append(axis)
    return tuple(axes)


def cut(value: torch.Tensor, axes: Sequence[int], length: int) -> torch.Tensor:
    """Return a view of the first positions along some dimensions."""
    for axis in axes:
        value = value.narrow(axis, 0, length)
    return value
