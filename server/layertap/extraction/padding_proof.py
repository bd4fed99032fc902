"""Tests which layers of a model keep their values if items are padded and share a pass.

Note [How padding is tested]
    Items of different lengths and contents are run one by one, without padding, and then padded to
    one length in one pass. A layer passes if each item's values at its own positions are equal, up
    to ``PADDING_TOLERANCE``. The longest item has the length up to which items may be padded, so
    that code which treats long input differently is seen, and a second pass has as many items as
    may ever run together.

    Code that looks at values may take another branch because of another item. That is allowed for
    looks at masks only: with padding on the right only, these follow from the lengths, which the
    test varies. A value after a discontinuous step (``topk``, ``argmax``) might flip near a tie, so
    such layers are left out.

    Of long items, some positions are compared: the first, the last, and some in between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from layertap.errors import LayertapError
from layertap.extraction.catalogue import Catalogue
from layertap.extraction.kinds.base import BuildContext
from layertap.extraction.kinds.registry import REFERENCE
from layertap.extraction.out_of_memory import is_out_of_memory
from layertap.extraction.outcomes import Outcomes
from layertap.extraction.own_words import own_words
from layertap.extraction.padding import TokenAxis, cut, token_axes
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.points import CapturePoint, PointKind
from layertap.extraction.proof import items_of
from layertap.extraction.samples import ordinary_batch, unlike_batch
from layertap.extraction.verify import difference
from layertap.models import Batch, BatchKey, LoadedModel, resized

__all__ = ["PADDING_TOLERANCE", "PaddingFindings", "prove_padding"]

_log = logging.getLogger(__name__)

PADDING_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}
"""Largest change that padding may make, as a share of the item's largest magnitude, by dtype.

Kernels for other shapes add in another order: in float32, 1e-6 was measured on BERT with 12 layers.
"""

_SHORT = 8
"""Length of the items of the pass that has many of them."""

_COMPARED = 12
"""Positions of a long item that are compared."""


@dataclass(frozen=True)
class PaddingFindings:
    """Which layers of a model may be padded, for requests that give certain inputs.

    Attributes:
        axes: For each point that passed: the dimensions that have the length of the items.
        refusals: For each other point: why it must not be padded.
        length: The length up to which this was tested; 0 if it was not.
        items: The number of items up to which this was tested.
    """

    axes: Mapping[CapturePoint, tuple[int, ...]]
    refusals: Mapping[CapturePoint, str]
    length: int = 0
    items: int = 0


def prove_padding(
    context: BuildContext,
    outcomes: Outcomes,
    catalogue: Catalogue,
    names: Sequence[str],
    max_tokens: int,
) -> PaddingFindings:
    """Test every layer of a model; see Note [How padding is tested]. For a compute thread.

    Args:
        context: The model and what belongs to it.
        outcomes: Shows what passes look at.
        catalogue: The model's catalogue.
        names: The inputs that the requests give.
        max_tokens: The most tokens of a pass in which items are padded.
    """
    tower = context.model.signature.tower_of(names)
    served = dict.fromkeys(
        point
        for entry in catalogue
        for side, point in entry.points.items()
        if point.kind is PointKind.MODULE
        and entry.serves(REFERENCE.id, side)
        and (tower is None or point in catalogue.towers[tower])
    )
    axis = TokenAxis.of(context.model)
    if axis is None:
        return _refused(served, "its inputs are no token ids of free length")
    if not context.scope.rules.shared:
        return _refused(served, "its passes can't be shared")
    axes, refusals = dict[CapturePoint, tuple[int, ...]](), dict[CapturePoint, str]()
    for point in served:
        found = token_axes(catalogue.specs[point], axis.symbol)
        if point in catalogue.looks.steps:
            found = f"its values depend on {catalogue.looks.steps[point]}"
        if isinstance(found, str):
            refusals[point] = found
        else:
            axes[point] = found
    if not axes:
        return PaddingFindings({}, refusals)
    trial = _Trial(context, outcomes, catalogue, axis, axes)
    try:
        length, leaks = trial.run(names, max_tokens)
    except Exception as error:  # noqa: BLE001 - a model may raise anything; each request runs alone
        _log.info("model %s: padding can't be tested", context.model.name, exc_info=True)
        words = str(error) if isinstance(error, LayertapError) else own_words(error)
        return _refused(served, f"it could not be tested: {words}")
    refusals.update(leaks)
    return PaddingFindings(
        {point: found for point, found in axes.items() if point not in leaks},
        refusals,
        length,
        trial.items,
    )


def _refused(points: Mapping[CapturePoint, None], reason: str) -> PaddingFindings:
    return PaddingFindings({}, dict.fromkeys(points, reason))


class _Item(NamedTuple):
    """One item that ran alone.

    Attributes:
        x: Its batch of one.
        length: Its length.
        values: Some of its values at each point; see ``_some``.
    """

    x: Batch
    length: int
    values: list[torch.Tensor]


class _Trial:
    """Runs items alone and padded, and compares their values.

    Attributes:
        items: The largest number of items that ran together.
    """

    def __init__(
        self,
        context: BuildContext,
        outcomes: Outcomes,
        catalogue: Catalogue,
        axis: TokenAxis,
        axes: Mapping[CapturePoint, tuple[int, ...]],
    ) -> None:
        self._model = context.model
        self._outcomes = outcomes
        self._axis = axis
        self._pass_spec = PassSpec(tuple(axes))
        self._specs = [catalogue.specs[point] for point in axes]
        self._axes = list(axes.values())
        self._built = REFERENCE.build(context, self._pass_spec)
        self.items = 0

    def run(self, names: Sequence[str], max_tokens: int) -> tuple[int, dict[CapturePoint, str]]:
        """Return the length that was tested, and why points must not be padded.

        Args:
            names: The inputs to give.
            max_tokens: The most tokens of a pass.
        """
        length = self._longest(names, max_tokens // 2)
        leaks: dict[CapturePoint, str] = {}
        for make in (ordinary_batch, unlike_batch):
            items = self._alone(make, names, _lengths(length))
            if not leaks and (reason := self._looks(items)):
                return length, dict.fromkeys(self._pass_spec.points, reason)
            self._compare(items, leaks)
        short = self._alone(unlike_batch, names, [min(length, n) for n in range(1, _SHORT + 1)])
        self._compare((short * (max_tokens // _SHORT))[: max(len(short), max_tokens // 4)], leaks)
        return length, leaks

    def _longest(self, names: Sequence[str], most: int) -> int:
        """Return the longest length up to a limit that the model takes."""
        tokenizer = self._model.tokenizer
        known = tokenizer.max_tokens if tokenizer is not None else 0
        length = max(2, min(most, known or most))
        while True:
            try:
                self._built.run(ordinary_batch(self._model, 1, self._key(names, length)), _ignore)
            except Exception:
                if length <= 2:
                    raise
                length //= 2
            else:
                return length

    def _key(self, names: Sequence[str], length: int) -> BatchKey:
        signature = self._model.signature
        whole = signature.whole_key
        key = BatchKey(tuple(item for item in whole.items if item.name in names))
        return resized(signature, key, {self._axis.symbol: length})

    def _alone(
        self,
        make: Callable[[LoadedModel, int, BatchKey], Batch],
        names: Sequence[str],
        lengths: Sequence[int],
    ) -> list[_Item]:
        """Run items of some lengths one by one; leave out those that the model does not take."""
        whole = make(self._model, len(lengths), self._key(names, max(lengths)))
        whole = self._axis.unmasked(whole)
        items = []
        for index, length in enumerate(lengths):
            x = self._axis.shortened(whole.narrow(index, 1), length).clone()
            values: dict[int, torch.Tensor] = {}

            def keep(
                point: int,
                value: torch.Tensor,
                length: int = length,
                values: dict[int, torch.Tensor] = values,
            ) -> None:
                values[point] = _some(value, self._axes[point], length).clone()

            try:
                self._built.run(x.clone(), keep)
            except Exception as error:
                if is_out_of_memory(error) or length == max(lengths):
                    raise
                continue  # A model may refuse very short items.
            items.append(_Item(x, length, [values[point] for point in range(len(self._axes))]))
        return items

    def _joined(self, items: Sequence[_Item]) -> Batch:
        longest = max(item.length for item in items)
        return Batch.cat([self._axis.padded(item.x, longest) for item in items])

    def _looks(self, items: Sequence[_Item]) -> str:
        """Return why the code's looks at values forbid to pad; empty if they allow it."""
        masks = self._axis.mask_names()
        for x in (items[-1].x, self._joined(items)):
            found = self._outcomes.record(self._pass_spec, x)
            for look in found.looks:
                names = set(look.program.inputs)
                if not names or names - masks:
                    seen = ", ".join(sorted(names - masks)) or "its input"
                    return f"the model's code branches on values of {seen}"
            if found.step:
                return f"its values depend on {found.step}"
        return ""

    def _compare(self, items: Sequence[_Item], leaks: dict[CapturePoint, str]) -> None:
        """Run items in one pass, and add the points whose values differ."""
        x, longest = self._joined(items), max(item.length for item in items)
        self.items = max(self.items, len(items))

        def see(point: int, value: torch.Tensor) -> None:
            reason = self._difference(point, value, items, longest)
            if reason:
                leaks.setdefault(self._pass_spec.points[point], reason)

        self._built.run(x.clone(), see)

    def _difference(
        self, point: int, value: torch.Tensor, items: Sequence[_Item], longest: int
    ) -> str:
        spec, axes = self._specs[point], self._axes[point]
        batch, size = spec.batch_axis or (0, 1)
        right = value.ndim == len(spec.dims) and value.shape[batch] == size * len(items)
        if not right or any(value.shape[axis] != longest for axis in axes):
            return f"its shape is {list(value.shape)} for {len(items)} items of {longest} tokens"
        worst = 0.0
        for index, item in enumerate(items):
            expected = item.values[point]
            mine = cut(items_of(value, spec, index, 1), axes, item.length)
            found = difference(_some(mine, axes, item.length), expected)
            if found > PADDING_TOLERANCE.get(expected.dtype, 0.0):
                worst = max(worst, found)
        return f"padding changes its values by {worst:.0e} of their magnitude" if worst else ""


def _ignore(point: int, value: torch.Tensor) -> None:
    return None


def _lengths(longest: int) -> list[int]:
    """Return the lengths of the items of one pass, in no order."""
    found = dict.fromkeys(
        (longest // 2, 1, longest, longest // 4, 2, longest * 3 // 4, 3, longest - 1)
    )
    return [length for length in found if 1 <= length <= longest]


def _some(value: torch.Tensor, axes: Sequence[int], length: int) -> torch.Tensor:
    """Return a value at a few of its positions, the first and the last ones among them."""
    if length <= _COMPARED:
        return value
    between = range(2, length - 3, max(1, (length - 5) // (_COMPARED - 5)))
    places = [0, 1, *between, length - 3, length - 2, length - 1]
    index = torch.tensor(places, device=value.device)
    for axis in axes:
        value = value.index_select(axis, index)
    return value
