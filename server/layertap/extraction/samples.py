"""Batches on which a proof sees what an ordinary sample hides.

Note [Samples that reach]
    A proof sees only what its inputs show. Random numbers in [0, 1) never reach ``clamp(-10, 10)``,
    ``nan_to_num`` or a division by the batch's maximum, and ids of 0 and 1 never reach a branch on
    a special id. So floating-point input is tried at several magnitudes, as bytes from 0 to 255,
    and with NaN and infinity in it; token ids over the whole table that they are looked up in (see
    ``id_range``), with repeats and padding. Where requests are to share a pass, the items of one
    batch differ as much as requests may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from layertap.extraction.survey import sample_input
from layertap.models import LoadedModel

__all__ = ["bytes_input", "reaching_inputs", "unlike_items"]

_Fill = Callable[[torch.Size, torch.Generator], torch.Tensor]

_MAGNITUDES: tuple[_Fill, ...] = (
    lambda size, generator: torch.randn(size, generator=generator) * 1e-3,
    lambda size, generator: torch.randn(size, generator=generator) * 2,
    lambda size, generator: torch.rand(size, generator=generator) * 255,
    lambda size, generator: torch.randn(size, generator=generator) * 1e4,
)

_EVERY = 61
"""One number in so many is NaN or infinite: few enough that layers have finite numbers left."""


def bytes_input(model: LoadedModel, item_shape: tuple[int, ...]) -> torch.Tensor | None:
    """Return one item of numbers in [0, 255); None where the model takes no floating point."""
    if not model.input.dtype.is_floating_point:
        return None
    generator = torch.Generator().manual_seed(2)
    return _on(model, torch.rand((1, *item_shape), generator=generator) * 255)


def reaching_inputs(model: LoadedModel, item_shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """Yield batches of three items ``[3, *item_shape]`` that show what a sample may hide.

    See Note [Samples that reach]. A model need not be able to take them.
    """
    if model.input.dtype.is_floating_point:
        yield unlike_items(model, 3, item_shape)
        yield _not_finite(model, item_shape)
        return
    for seed in (3, 4):
        yield _ids(model, 3, item_shape, seed)


def unlike_items(model: LoadedModel, items: int, item_shape: tuple[int, ...]) -> torch.Tensor:
    """Return a batch ``[items, *item_shape]`` whose items differ as much as requests may."""
    if not model.input.dtype.is_floating_point:
        return _ids(model, items, item_shape, 5)
    generator = torch.Generator().manual_seed(6)
    fills = [_MAGNITUDES[index % len(_MAGNITUDES)] for index in range(items)]
    size = torch.Size(item_shape)
    return _on(model, torch.stack([fill(size, generator) for fill in fills]))


def _not_finite(model: LoadedModel, item_shape: tuple[int, ...]) -> torch.Tensor:
    """Return an ordinary item, one with NaN in it and one with infinities."""
    generator = torch.Generator().manual_seed(7)
    values = torch.randn((3, *item_shape), generator=generator)
    values[1].view(-1)[::_EVERY] = float("nan")
    values[2].view(-1)[::_EVERY] = float("inf")
    values[2].view(-1)[_EVERY // 2 :: _EVERY] = -float("inf")
    return _on(model, values)


def _ids(model: LoadedModel, items: int, item_shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return ids of the whole range: low ones in one item, high ones in the next, then padding."""
    known = model.input.ids
    if known is None:
        return sample_input(model, items, item_shape)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, known.rows, (items, *item_shape), generator=generator)
    for index, item in enumerate(values):
        row = item.view(-1)
        match index % 3:
            case 0:
                item.remainder_(max(2, known.rows // 10))
            case 1:
                row[: max(1, len(row) // 2)] = known.rows - 1
            case _:
                row[len(row) // 2 :] = known.padding
    return _on(model, values)


def _on(model: LoadedModel, values: torch.Tensor) -> torch.Tensor:
    return values.to(model.device, model.input.dtype)
