"""Batches for testing a model: ordinary ones, and unusual ones that expose hidden faults.

Every batch is seeded, so the same call gives the same numbers. Batches are on the model's device
and have the dtypes of its inputs. If the model's factory makes example batches, these are used.

Note [Samples that reach]
    A proof sees only the code that its inputs reach. Random numbers in [0, 1) never reach
    ``clamp(-10, 10)``, ``nan_to_num`` or a division by the batch's maximum, and ids of 0 and 1
    never reach a branch on a special id. So floating-point input is tested at several magnitudes,
    as bytes from 0 to 255, and with NaN and infinity in it. Token ids are tested over the whole
    table that they index (see ``id_range``), with repeats and padding. To test whether requests may
    share a pass, the items of one batch differ as much as requests may.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace

import torch

from layertap.errors import ModelLoadError
from layertap.models import (
    Batch,
    BatchKey,
    Boxes,
    IdRange,
    InputSpec,
    ItemTensor,
    LoadedModel,
    Mask,
)
from layertap.models.loaded import Example
from layertap.models.seeding import seeded

__all__ = ["bytes_batch", "ordinary_batch", "reaching_batches", "unlike_batch", "wide_batch"]

Shape = tuple[int, ...]
Fill = Callable[[Shape, torch.Generator], torch.Tensor]
"""Fills a floating-point input of a shape, which includes the batch dimension."""

_MAGNITUDES: tuple[Fill, ...] = (
    lambda shape, generator: torch.randn(shape, generator=generator) * 1e-3,
    lambda shape, generator: torch.randn(shape, generator=generator) * 2,
    lambda shape, generator: torch.rand(shape, generator=generator) * 255,
    lambda shape, generator: torch.randn(shape, generator=generator) * 1e4,
)

_EVERY = 61
"""Every 61st number is NaN or infinite: few enough to leave finite numbers in every layer."""


def ordinary_batch(model: LoadedModel, size: int, key: BatchKey | None = None) -> Batch:
    """Return a batch of numbers in [0, 1), or of ids over the whole known range.

    Args:
        model: The model.
        size: The number of items.
        key: The shapes of an item; the model's default shapes if not given.
    """
    return _batch(model, size, key, seed=0, fill=_uniform, ids=_uniform_ids)


def wide_batch(model: LoadedModel, size: int, key: BatchKey | None = None) -> Batch | None:
    """Return a batch of normally distributed numbers, with a standard deviation of 2.

    That is twice as wide as normalised images. None for a model without floating-point inputs.
    """
    if not model.signature.has_floats:
        return None
    return _batch(model, size, key, seed=1, fill=_MAGNITUDES[1], ids=_uniform_ids)


def bytes_batch(model: LoadedModel, key: BatchKey | None = None) -> Batch | None:
    """Return one item of numbers in [0, 255); None for a model without floating-point inputs."""
    if not model.signature.has_floats:
        return None
    return _batch(model, 1, key, seed=2, fill=_MAGNITUDES[2], ids=_uniform_ids)


def reaching_batches(model: LoadedModel, key: BatchKey | None = None) -> Iterator[Batch]:
    """Yield batches of three items that reach code which an ordinary batch may not reach.

    See Note [Samples that reach]. A model may refuse them.
    """
    if model.signature.has_floats:
        yield unlike_batch(model, 3, key)
        yield _batch(model, 3, key, seed=7, fill=_not_finite, ids=_unlike_ids)
        return
    for seed in (3, 4):
        yield _batch(model, 3, key, seed=seed, fill=_unlike, ids=_unlike_ids)


def unlike_batch(model: LoadedModel, size: int, key: BatchKey | None = None) -> Batch:
    """Return a batch whose items differ as much as the items of several requests may."""
    seed = 6 if model.signature.has_floats else 5
    return _batch(model, size, key, seed=seed, fill=_unlike, ids=_unlike_ids)


def _batch(
    model: LoadedModel,
    size: int,
    key: BatchKey | None,
    *,
    seed: int,
    fill: Fill,
    ids: Callable[[InputSpec, Shape, torch.Generator], torch.Tensor],
) -> Batch:
    key = key or model.signature.key
    if model.example is not None and key in (model.signature.key, model.signature.whole_key):
        return _made(model.example, model, size, key, seed)
    tensors = {}
    for index, item in enumerate(key.items):
        spec = model.signature.spec(item.name)
        generator = torch.Generator().manual_seed(seed + 100 * index)
        shape = (size, *item.shape)
        if isinstance(spec.values, Mask):
            values = _mask(shape, spec.values.padding, varied=ids is _unlike_ids)
        elif isinstance(spec.values, Boxes):
            values = _boxes(shape, spec.values.most, generator)
        elif spec.dtype.is_floating_point:
            values = fill(shape, generator)
        else:
            values = ids(spec, shape, generator)
        tensors[spec.name] = values.to(spec.dtype)
    return _vetted(model, Batch(tensors), (seed, fill, ids))


def _made(example: Example, model: LoadedModel, size: int, key: BatchKey, seed: int) -> Batch:
    """Return a batch made by the model's own function, which knows what numbers are valid.

    Raises:
        ModelLoadError: Its tensors don't match the inputs.
    """
    with seeded(seed):
        made = example(size)
    wrong = [item for item in key.items if not _is_item(made.get(item.name), item, size)]
    if wrong:
        raise ModelLoadError(
            f"model {model.name!r}: its example function did not return {wrong[0]} for a batch of "
            f"{size}"
        )
    return _vetted(model, Batch({item.name: made[item.name] for item in key.items}), seed)


def _vetted(model: LoadedModel, batch: Batch, identity: Hashable) -> Batch:
    """Return a batch on the model's device, which its ``forward`` refuses if the twin fails."""
    there = batch.map(lambda tensor: tensor.to(model.device))
    if model.twin is None:
        return there
    here = batch.map(lambda tensor: tensor.to("cpu"))
    return replace(there, refusal=model.twin.refusal(model, here, identity))


def _is_item(made: torch.Tensor | None, item: ItemTensor, size: int) -> bool:
    return made is not None and tuple(made.shape) == (size, *item.shape)


def _mask(shape: Shape, padding: int, *, varied: bool) -> torch.Tensor:
    """Return a mask: in even items all elements count, in odd items only those of one half.

    Args:
        shape: The shape, including the batch.
        padding: The number for padding, 0 or 1.
        varied: Whether the half alternates: the second half in the first odd item, as if text is
            padded on its left, then the first half. If not, it is always the first half.
    """
    mask = torch.full(shape, 1.0 - padding)
    size, *item = shape
    if not item:
        return mask
    for index in range(1, size, 2):
        last = item[-1]
        left = varied and index % 4 == 1
        where = slice(0, last // 2) if left else slice(last - last // 2, last)
        mask[index, ..., where] = padding
    return mask


def _boxes(shape: Shape, most: int, generator: torch.Generator) -> torch.Tensor:
    """Return boxes ``[..., 4]``: left, top, right and bottom."""
    corners = torch.randint(0, most + 1, (*shape[:-1], 2, 2), generator=generator)
    return corners.sort(-2).values.flatten(-2)


def _uniform(shape: Shape, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float32)


def _uniform_ids(spec: InputSpec, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    rows = spec.values.rows if isinstance(spec.values, IdRange) else 2
    return torch.randint(0, rows, shape, generator=generator)


def _unlike(shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """Return items of very different magnitudes."""
    size, *item = shape
    fills = [_MAGNITUDES[index % len(_MAGNITUDES)] for index in range(size)]
    return torch.stack([fill(tuple(item), generator) for fill in fills])


def _not_finite(shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """Return one ordinary item, one with NaN and one with infinities."""
    values = torch.randn(shape, generator=generator)
    values[1].view(-1)[::_EVERY] = float("nan")
    values[2].view(-1)[::_EVERY] = float("inf")
    values[2].view(-1)[_EVERY // 2 :: _EVERY] = -float("inf")
    return values


def _unlike_ids(spec: InputSpec, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """Return ids over the whole range: low ids, then an item of high ids, then one with padding."""
    known = spec.values
    if not isinstance(known, IdRange):
        return _uniform_ids(spec, shape, torch.Generator().manual_seed(0))
    values = torch.randint(0, known.rows, shape, generator=generator)
    for index, item in enumerate(values):
        row = item.view(-1)
        match index % 3:
            case 0:
                item.remainder_(max(2, known.rows // 10))
            case 1:
                row[: max(1, len(row) // 2)] = known.rows - 1
            case _:
                row[len(row) // 2 :] = known.padding
    return values
