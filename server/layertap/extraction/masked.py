"""Reductions of the tokens of texts, in which padding does not count.

The values are ``[B, L, C]``: a row for each position of the input. The mask of the request says
which positions count; without a mask all of them do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from layertap.errors import InvalidInputError
from layertap.extraction.points import Dim, ValueSpec
from layertap.selection import Reduction

__all__ = ["MASKED", "Tokens", "masked"]

Apply = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The positions of a batch of texts, on the CPU.

    Attributes:
        mask: bool ``[B, L]``: whether a position is a token that counts, not padding.
        words: int64 ``[B, L]``: the number of the word to which a token belongs, -1 for none;
            None if the request had no texts.
    """

    mask: torch.Tensor
    words: torch.Tensor | None = None

    def repeated(self, times: int) -> Tokens:
        """Return the positions of a batch that has all items several times."""
        words = None if self.words is None else self.words.repeat(times, 1)
        return Tokens(self.mask.repeat(times, 1), words)


MASKED = frozenset(
    {
        Reduction.GLOBAL_AVERAGE_POOL,
        Reduction.CLASS_TOKEN,
        Reduction.LAST_TOKEN,
        Reduction.TOKEN_MAX,
        Reduction.TOKENS,
        Reduction.WORDS,
    }
)
"""The reductions that use the mask."""


def masked(
    reduction: Reduction, spec: ValueSpec, tokens: Tokens | None, layer: str
) -> tuple[Sequence[Dim], Apply] | None:
    """Return the dimensions of a reduction's result for values ``[B, L, C]``, and the function.

    The dimensions are those after the batch; for a ragged reduction, all of them.

    Args:
        reduction: One of ``MASKED``.
        spec: The dtype and shape of the values.
        tokens: Which positions count; None if all do.
        layer: The layer's name, for the error message.

    Returns:
        None if the reduction can't be applied to such values.

    Raises:
        InvalidInputError: The mask and the values differ in length, an item has no token that
            counts, or the words are not known.
    """
    length, channels = spec.dims[1].size, spec.dims[2]
    if tokens is not None:
        _check(reduction, tokens, length, layer)
        if not reduction.ragged and _all(tokens.mask):
            tokens = None
    match reduction:
        case Reduction.GLOBAL_AVERAGE_POOL:
            return ([channels], _mean(tokens)) if spec.dtype.is_floating_point else None
        case Reduction.CLASS_TOKEN:
            return [channels], _at(None if tokens is None else _first(tokens.mask), 0)
        case Reduction.LAST_TOKEN:
            return [channels], _at(None if tokens is None else _last(tokens.mask), -1)
        case Reduction.TOKEN_MAX:
            return [channels], _max(tokens)
    if tokens is None:
        raise InvalidInputError(
            f"reduction: {reduction.name} of layer {layer!r} needs texts or a mask, expected one "
            f"of these in the request"
        )
    if reduction is Reduction.TOKENS:
        return [Dim(int(tokens.mask.sum())), channels], _rows(tokens.mask)
    return _words(tokens, spec, layer)


def _all(mask: torch.Tensor) -> bool:
    return bool(mask.all())


def _check(reduction: Reduction, tokens: Tokens, length: int, layer: str) -> None:
    if tokens.mask.shape[1] != length and (reduction.ragged or not _all(tokens.mask)):
        raise InvalidInputError(
            f"reduction: {reduction.name} of layer {layer!r} has {length} positions, and the mask "
            f"{tokens.mask.shape[1]}, so which of them are padding is not known; send items of one "
            f"length, or one at a time"
        )
    empty = (~tokens.mask.any(1)).nonzero()
    if len(empty):
        raise InvalidInputError(
            f"reduction: {reduction.name} of layer {layer!r}: the mask of item {int(empty[0])} "
            f"counts no token, expected at least one"
        )


def _mean(tokens: Tokens | None) -> Apply:
    if tokens is None:
        return lambda value: value.mean(1)
    mask = tokens.mask

    def mean(value: torch.Tensor) -> torch.Tensor:
        own = mask.to(value.device)[:, :, None]
        # Where padding holds NaN or infinity, a product with 0 would be NaN.
        total = value.masked_fill(~own, 0).sum(1, dtype=_wide(value.dtype))
        return (total / own.sum(1)).to(value.dtype)

    return mean


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype


def _max(tokens: Tokens | None) -> Apply:
    if tokens is None:
        return lambda value: value.amax(1)
    mask = tokens.mask

    def largest(value: torch.Tensor) -> torch.Tensor:
        floating = value.dtype.is_floating_point
        least = -torch.inf if floating else torch.iinfo(value.dtype).min
        return value.masked_fill(~mask.to(value.device)[:, :, None], least).amax(1)

    return largest


def _first(mask: torch.Tensor) -> torch.Tensor:
    return mask.to(torch.uint8).argmax(1)


def _last(mask: torch.Tensor) -> torch.Tensor:
    return mask.shape[1] - 1 - _first(mask.flip(1))


def _at(places: torch.Tensor | None, place: int) -> Apply:
    """Return a function that takes the row at each item's own place, or at one place for all."""
    if places is None:
        return lambda value: value[:, place]
    items = torch.arange(len(places))
    return lambda value: value[items.to(value.device), places.to(value.device)]


def _rows(mask: torch.Tensor) -> Apply:
    return lambda value: value[mask.to(value.device)]


def _words(tokens: Tokens, spec: ValueSpec, layer: str) -> tuple[Sequence[Dim], Apply] | None:
    if tokens.words is None:
        raise InvalidInputError(
            f"reduction: WORDS of layer {layer!r} needs texts, expected them in the request: a "
            f"tensor of token ids does not say which word a token belongs to"
        )
    if not spec.dtype.is_floating_point:
        return None
    words = tokens.words
    items = torch.arange(len(words))[:, None].expand_as(words)
    of_words = words >= 0
    pairs = torch.stack([items[of_words], words[of_words]], 1)
    found, rows, counts = pairs.unique(dim=0, return_inverse=True, return_counts=True)

    def mean(value: torch.Tensor) -> torch.Tensor:
        wide = _wide(value.dtype)
        taken = value[of_words.to(value.device)].to(wide)
        total = torch.zeros(len(found), value.shape[2], dtype=wide, device=value.device)
        total.index_add_(0, rows.to(value.device), taken)
        means: torch.Tensor = total / counts.to(value.device)[:, None]
        return means.to(value.dtype)

    return [Dim(len(found)), spec.dims[2]], mean
