"""The input of one forward pass: a tensor for each input of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["Batch", "BatchKey", "ItemTensor"]


class ItemTensor(NamedTuple):
    """One item's tensor for one input.

    Attributes:
        name: The input's name.
        shape: The item's shape, without the batch dimension.
        dtype: The dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        """Return a text such as ``x [3, 224, 224] float32``."""
        return f"{self.name} {list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True)
class BatchKey:
    """What all batches of one plan have in common: input names, item shapes and dtypes.

    Attributes:
        items: One entry per tensor of such a batch, in the order of the model's inputs.
    """

    items: tuple[ItemTensor, ...]

    @property
    def main(self) -> ItemTensor:
        """The entry of the model's first input; see ``Signature.main``."""
        return self.items[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the inputs."""
        return tuple(item.name for item in self.items)

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of an item of one input; None if such batches don't have it."""
        return next((item.shape for item in self.items if item.name == name), None)

    def with_shape(self, name: str, shape: Sequence[int]) -> BatchKey:
        """Return the key with another shape of the items of one input."""
        return BatchKey(
            tuple(
                item._replace(shape=tuple(shape)) if item.name == name else item
                for item in self.items
            )
        )

    def __str__(self) -> str:
        """Return the tensors of an item as comma-separated text."""
        return ", ".join(map(str, self.items))


@dataclass(frozen=True, slots=True, eq=False)
class Batch(Mapping[str, torch.Tensor]):
    """Named tensors ``[B, ...]`` of one batch size B on one device.

    Attributes:
        tensors: The tensors by input name, in the order of the model's inputs. At least one.
        refusal: Why the model must not run it; empty if it may. See ``LoadedModel.twin``.
    """

    tensors: dict[str, torch.Tensor]
    refusal: str = ""

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return the tensor of an input."""
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """Return the number of tensors; ``size`` is the number of items."""
        return len(self.tensors)

    @property
    def size(self) -> int:
        """Return B, the number of items."""
        return int(next(iter(self.tensors.values())).shape[0])

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return next(iter(self.tensors.values())).device

    @property
    def only(self) -> torch.Tensor:
        """The only tensor; raises ValueError if there are several."""
        (tensor,) = self.tensors.values()
        return tensor

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the tensors, including the batch dimension."""
        return tuple(tuple(tensor.shape) for tensor in self.tensors.values())

    @property
    def key(self) -> BatchKey:
        """Return the key, which batches of other sizes share."""
        return BatchKey(
            tuple(
                ItemTensor(name, tuple(tensor.shape[1:]), tensor.dtype)
                for name, tensor in self.tensors.items()
            )
        )

    def equals(self, other: Batch) -> bool:
        """Return whether another batch has the same tensors with the same elements, none NaN."""
        return self.key == other.key and all(torch.equal(self[name], other[name]) for name in self)

    @property
    def nbytes(self) -> int:
        """Return the size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def is_finite(self) -> bool:
        """Return whether no floating-point element is NaN or infinite."""
        return all(map(_is_finite, self.tensors.values()))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Return a batch with ``change`` applied to every tensor."""
        tensors = {name: change(tensor) for name, tensor in self.tensors.items()}
        return Batch(tensors, self.refusal)

    def clone(self) -> Batch:
        """Return a copy, for a model that writes into its input."""
        return self.map(torch.clone)

    def narrow(self, begin: int, size: int) -> Batch:
        """Return ``size`` items from item ``begin`` on, as views."""
        return self.map(lambda tensor: tensor.narrow(0, begin, size))

    @staticmethod
    def cat(batches: Sequence[Batch]) -> Batch:
        """Concatenate batches of one key."""
        refusals = (batch.refusal for batch in batches if batch.refusal)
        tensors = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        return Batch(tensors, next(refusals, ""))


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.dtype.is_floating_point:
        return True
    # If any element is not finite, neither is the sum. It takes a tenth of the time of a full test.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
