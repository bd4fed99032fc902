"""Batches like a given one, for proving a plan for the outcome that the given one has.

Samples need not show the outcome of a request (see ``guards``). What the request itself holds does,
and so do many batches that differ little from it: those are tried, and the ones that keep the
outcome prove the plan.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from layertap.models import Batch, LoadedModel

__all__ = ["resized", "unpadded", "variations"]


def resized(x: Batch, size: int) -> Batch:
    """Return a batch of that many items: those of a batch in turn."""
    chosen = torch.arange(size) % x.size
    return x.map(lambda tensor: tensor[chosen.to(tensor.device)].clone())


def unpadded(model: LoadedModel, x: Batch) -> Batch | None:
    """Return a batch with the padding among its token ids replaced by other ids.

    None if there is nothing to replace. Masks are full where ids have no padding.
    """
    changed = dict(x.tensors)
    for spec in model.signature.inputs:
        if spec.ids is not None and spec.name in changed and spec.ids.rows > 1:
            ids = changed[spec.name]
            other = (spec.ids.padding + 1) % spec.ids.rows
            changed[spec.name] = torch.where(ids == spec.ids.padding, other, ids)
    full = Batch(changed)
    same = all(torch.equal(full[name], x[name]) for name in x)
    return None if same else full


def variations(model: LoadedModel, x: Batch, sizes: tuple[int, ...] = (1, 2, 3)) -> Iterator[Batch]:
    """Yield batches of each size that differ from a batch in their values. All are seeded.

    Floating-point numbers are scaled, moved a little, and drawn again within the range of the
    given ones. Token ids are replaced by others where they are no padding. Everything else, such
    as masks, stays as it is, or moves along the item by one place together with all the rest.

    Args:
        model: The model.
        x: The batch, on the model's device, of its inputs' element types.
        sizes: Items of the batches to make.
    """
    for seed, size in enumerate((*sizes, *sizes)):
        yield _changed(model, resized(x, size), seed)
    for size in sizes:
        yield resized(x, size).map(_rolled)


def _rolled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.roll(1, -1) if tensor.ndim > 1 else tensor


def _changed(model: LoadedModel, x: Batch, seed: int) -> Batch:
    tensors = dict(x.tensors)
    for index, spec in enumerate(model.signature.inputs):
        if spec.name not in tensors:
            continue
        tensor = tensors[spec.name]
        generator = torch.Generator().manual_seed(900 + seed + 100 * index)
        if tensor.is_floating_point():
            tensors[spec.name] = _floats(tensor, seed, generator)
        elif spec.ids is not None:
            ids = torch.randint(0, spec.ids.rows, tensor.shape, generator=generator)
            ids = ids.to(tensor.device, tensor.dtype)
            keep = (tensor == spec.ids.padding) | (ids == spec.ids.padding)
            tensors[spec.name] = torch.where(keep, tensor, ids)
    return Batch(tensors)


def _floats(tensor: torch.Tensor, seed: int, generator: torch.Generator) -> torch.Tensor:
    noise = torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
    if seed % 3 == 0:
        return tensor * (0.5 + noise)
    if seed % 3 == 1:
        return tensor + (noise - 0.5) * tensor.std(correction=0)
    low, high = tensor.amin(), tensor.amax()
    return low + noise * (high - low)
