"""Batches similar to a given one, to prove a plan for the given one's outcome.

Samples may not have the outcome of a request (see ``guards``). The request's own batch has it, and
so do many similar batches: these are tried, and those with the same outcome prove the plan.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from layertap.models import Batch, Boxes, IdRange, LoadedModel, Mask

__all__ = ["paddings", "resized", "variations"]


def resized(x: Batch, size: int) -> Batch:
    """Return a batch of ``size`` items, which repeat those of a batch in turn."""
    chosen = torch.arange(size) % x.size
    return x.map(lambda tensor: tensor[chosen.to(tensor.device)].clone())


def paddings(model: LoadedModel, x: Batch) -> Iterator[Batch]:
    """Yield batches without padding, with the second half padded, and with the first half padded.

    This changes masks, and the padding in token ids. A model that has neither gets no batches.
    """
    values = {spec.name: spec.values for spec in model.signature.inputs if spec.name in x}
    if not any(values.values()):
        return
    for place in ("nowhere", "right", "left"):
        tensors = dict(x.tensors)
        for name, known in values.items():
            if known is not None and not isinstance(known, Boxes) and tensors[name].ndim > 1:
                tensors[name] = _padded(tensors[name], known, place)
        yield Batch(tensors)


def _padded(tensor: torch.Tensor, known: IdRange | Mask, place: str) -> torch.Tensor:
    full = tensor.clone()
    if isinstance(known, Mask):
        full.fill_(1 - known.padding)
    elif known.rows > 1:
        full[full == known.padding] = (known.padding + 1) % known.rows
    half = full.shape[-1] // 2
    if place == "right":
        full[..., full.shape[-1] - half :] = known.padding
    elif place == "left":
        full[..., :half] = known.padding
    return full


def variations(model: LoadedModel, x: Batch, sizes: tuple[int, ...] = (1, 2, 3)) -> Iterator[Batch]:
    """Yield batches of each size with other values than a batch. All are seeded.

    Floating-point numbers are scaled, moved a little, and drawn again within the given range. Token
    ids are replaced by others, except for padding. Everything else, such as masks, is not changed,
    or all tensors are moved along the item by one place. Of several inputs, each is also changed
    alone, as the outcome may depend on some of them only.

    Args:
        model: The model.
        x: The batch, on the model's device and in its dtypes.
        sizes: The numbers of items of the batches.
    """
    for seed, size in enumerate((*sizes, *sizes)):
        yield _changed(model, resized(x, size), seed)
    for size in sizes:
        yield resized(x, size).map(_rolled)
    if len(x) > 1:
        for seed, size in enumerate(sizes, 2 * len(sizes)):
            changed = _changed(model, resized(x, size), seed)
            for name in x:
                yield Batch({**resized(x, size).tensors, name: changed[name]})


def _rolled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.roll(1, -1) if tensor.ndim > 1 else tensor


def _changed(model: LoadedModel, x: Batch, seed: int) -> Batch:
    tensors = dict(x.tensors)
    for index, spec in enumerate(model.signature.inputs):
        if spec.name not in tensors:
            continue
        tensor = tensors[spec.name]
        generator = torch.Generator().manual_seed(900 + seed + 100 * index)
        if isinstance(spec.values, Mask):
            continue
        if tensor.is_floating_point():
            tensors[spec.name] = _floats(tensor, seed, generator)
        elif isinstance(spec.values, IdRange):
            ids = torch.randint(0, spec.values.rows, tensor.shape, generator=generator)
            ids = ids.to(tensor.device, tensor.dtype)
            keep = (tensor == spec.values.padding) | (ids == spec.values.padding)
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
