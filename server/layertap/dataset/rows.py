"""Turns the layers of a batch into rows: arrays whose first dimension is the item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from layertap.errors import InvalidInputError
from layertap.regrid import NO_REGRID
from layertap.selection import Glob, LayerSelection, Reduction

if TYPE_CHECKING:
    from layertap.description import ModelDescription, ValueDescription

__all__ = ["RowRules", "batch_axes"]


@dataclass(frozen=True, slots=True)
class RowRules:
    """How the values of a batch are divided into items.

    Attributes:
        axes: By output name, the dimension that grows with the batch; None if there is none: no
            dimension grows, several do, or the items are interleaved.
        ragged: The outputs of which items have different lengths.
    """

    axes: Mapping[str, int | None]
    ragged: frozenset[str]

    @classmethod
    def of(cls, model: ModelDescription, selections: Sequence[LayerSelection]) -> RowRules:
        """Return the rules for layers of a model."""
        ragged = {
            name
            for selection in selections
            if selection.reduction.ragged
            for name in batch_axes(model, [selection])
        }
        return cls(batch_axes(model, selections), frozenset(ragged))

    @property
    def one_by_one(self) -> bool:
        """Whether an output can be divided only if each pass has a single item."""
        return bool(self.ragged) or None in self.axes.values()

    def rows(self, name: str, array: np.ndarray, items: int) -> np.ndarray:
        """Return an output as ``[items, ...]``; a view where possible.

        If an item has several elements along the batch dimension, as windows do, these stay a
        dimension of the row.

        Raises:
            InvalidInputError: If the output can't be divided into this many items.
        """
        axis = self.axes.get(name, 0)
        if items == 1 and (axis is None or name in self.ragged):
            return array[None]
        if axis is None or axis >= array.ndim or array.shape[axis] % items:
            raise InvalidInputError(
                f"output {name!r}: got the shape {list(array.shape)} for {items} items, of which "
                f"no dimension is the number of items; use --batch-size 1"
            )
        each = array.shape[axis] // items
        shape = [*array.shape[:axis], items, each, *array.shape[axis + 1 :]]
        rows = np.moveaxis(array.reshape(shape), axis, 0)
        return rows[(slice(None),) * (axis + 1) + (0,)] if each == 1 else rows


def batch_axes(
    description: ModelDescription, selections: Sequence[LayerSelection]
) -> dict[str, int | None]:
    """Return the batch dimension of each output, by its name in the reply.

    It is None if there is no such dimension: none grows with the batch, several do, or the items
    are interleaved along it. Outputs that are not layers, such as the value of an objective and
    gradients of the model's inputs, are not in the result: their items are the first dimension.
    """
    axes: dict[str, int | None] = {}
    for selection in selections:
        if selection.concat:
            axes[selection.name_for(selection.layer)] = 0
            continue
        glob = Glob(selection.layer)
        for layer in description.layers:
            if layer.name == selection.layer or glob.matches(layer.name):
                plain = (
                    selection.reduction is Reduction.NONE
                    and selection.regrid == NO_REGRID
                    and not selection.method.is_map
                )
                axis = _batch_axis(layer.values.get(selection.capture.side)) if plain else 0
                axes[selection.name_for(layer.name)] = axis
    return axes


def _batch_axis(value: ValueDescription | None) -> int | None:
    if value is None:
        return None
    grown = [axis for axis, dim in enumerate(value.shape) if dim.batch]
    return None if value.interleaved or value.dynamic or len(grown) != 1 else grown[0]
