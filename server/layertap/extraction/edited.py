"""Runs passes with interventions.

Note [Sets of interventions]
    A request may have several sets of interventions. Its reply is that of a batch which has all
    items once for each set. There are three ways to compute it:

    - Item by item, where the part of the pass before the first changed value runs once: there the
      value gets a row for each set, and the rest of the pass runs on these rows. What comes past
      the value, such as a residual connection, still has a single row, which PyTorch broadcasts.
      That is not right for every model. So it is done only where a trial with a different change in
      each row gave the values of as many separate passes.
    - Otherwise the whole pass runs on a batch that has the items several times.
    - Where items influence each other, or an intervention takes something from another item, each
      set has a pass of its own.

    The rows of a pass are limited by the bytes that they are expected to take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from layertap.errors import ExtractorUnsupportedError, InvalidInputError
from layertap.extraction.gradients import GradientExtractor
from layertap.extraction.interventions import Changes, PassRows
from layertap.extraction.kinds.base import BuildContext
from layertap.extraction.operands import ItemAxis, Operands
from layertap.extraction.points import CapturePoint, Sink, ValueSpec
from layertap.models import Batch

__all__ = ["BoundChanges", "ChangedGradients", "EditedExtractor"]


class EditedExtractor:
    """Runs the model with its taps, which change values and capture others.

    Args:
        context: The model, its taps and scope.
        points: The values to capture.
        specs: Their dtypes and shapes.
        sets: The number of sets of interventions; 1 without sets.
        expands: Whether the first changed value may get the rows of all sets; see Note [Sets of
            interventions].
        most_rows: The most rows of a pass with several sets.
    """

    def __init__(
        self,
        context: BuildContext,
        points: Sequence[CapturePoint],
        specs: Sequence[ValueSpec],
        *,
        sets: int = 1,
        expands: bool = False,
        most_rows: int = 1,
    ) -> None:
        self._context = context
        self.points = points
        self._axes = [ItemAxis.of(spec) for spec in specs]
        self.sets, self.expands, self.most_rows = sets, expands, most_rows

    def run(self, x: Batch, sink: Sink) -> None:
        """Raise ValueError: the pass needs interventions; see ``run_with``."""
        raise ValueError("a pass with interventions needs their numbers")

    def run_with(self, changes: Changes, x: Batch, sink: Sink, *, alone: bool = False) -> None:
        """Run a batch; see ``BuiltExtractor.run``.

        Args:
            changes: The interventions.
            x: The batch.
            sink: Receives the values of the points, then the reports.
            alone: Whether the items of a batch may influence each other.

        Raises:
            InvalidInputError: If an intervention changed nothing, or doesn't fit a value.
        """
        if self.sets == 1:
            self.one_pass(changes, x, PassRows.whole(x.size), sink)
            changes.tally.end_pass()
        else:
            self._run_sets(changes, x, sink, alone=alone or changes.mix_items)
        changes.finish(sink, len(self.points))

    def one_pass(
        self, changes: Changes, x: Batch, rows: PassRows, sink: Sink, *, expand: bool = False
    ) -> None:
        """Run a pass without reporting."""
        edits, watches = changes.edits(rows, expand=expand)
        with self._context.scope as scope:
            self._context.taps.run(
                self._context.model.forward,
                x,
                self.points,
                sink,
                to_end=not scope.rules.early_stop,
                own_threads=scope.rules.own_threads,
                edits=edits,
                watches=watches,
            )

    def _run_sets(self, changes: Changes, x: Batch, sink: Sink, *, alone: bool) -> None:
        for point, axis in zip(self.points, self._axes, strict=True):
            if axis.axis is None:
                raise InvalidInputError(
                    f"interventions: the value of {point.path!r} has no batch dimension that is "
                    f"known, so it is served for one set of interventions per request"
                )
        sets = range(1, self.sets + 1)
        pieces = _Pieces(self.points, self._axes)
        if alone:
            for each in sets:
                rows = PassRows(range(x.size), x.size, (each,))
                pieces.run(self, changes, x, rows)
        elif self.expands:
            for item in range(x.size):
                for begin in range(0, self.sets, self.most_rows):
                    rows = PassRows((item,), x.size, sets[begin : begin + self.most_rows])
                    pieces.run(self, changes, x.narrow(item, 1), rows, expand=True)
        else:
            step = max(1, self.most_rows // x.size)
            for begin in range(0, self.sets, step):
                rows = PassRows(range(x.size), x.size, sets[begin : begin + step])
                pieces.run(self, changes, Batch.cat([x] * len(rows.blocks)), rows)
        pieces.join(sink, x.size)


class _Pieces:
    """The values of several passes, put together set by set.

    Args:
        points: What is captured.
        axes: Where the items are in each value.
    """

    def __init__(self, points: Sequence[CapturePoint], axes: Sequence[ItemAxis]) -> None:
        self._points, self._axes = points, axes
        self._found: list[dict[tuple[int, int], torch.Tensor]] = [{} for _ in points]

    def run(
        self,
        extractor: EditedExtractor,
        changes: Changes,
        x: Batch,
        rows: PassRows,
        *,
        expand: bool = False,
    ) -> None:
        """Run a pass and keep its values."""

        def keep(index: int, value: torch.Tensor) -> None:
            axis, per_item = self._axes[index]
            kept, each = value.clone(), len(rows.items) * per_item
            # What does not depend on a changed value has the rows of a single block.
            blocks = (
                range(len(rows.blocks)) if kept.shape[axis or 0] > each else [0] * len(rows.blocks)
            )
            for block, of in zip(blocks, rows.blocks, strict=True):
                key = of, rows.items[0]
                self._found[index][key] = kept.narrow(axis or 0, block * each, each)

        extractor.one_pass(changes, x.clone(), rows, keep, expand=expand)
        changes.tally.end_pass()

    def join(self, sink: Sink, size: int) -> None:
        """Capture the values of all passes."""
        for index, found in enumerate(self._found):
            values = [found[key] for key in sorted(found)]
            sink(index, torch.cat(values, self._axes[index].axis or 0))
            found.clear()


@dataclass(frozen=True, eq=False)
class BoundChanges:
    """An extractor with the interventions of a request, a ``BuiltExtractor``.

    Attributes:
        extractor: The extractor.
        changes: The interventions.
        alone: Whether the items of a batch may influence each other.
    """

    extractor: EditedExtractor
    changes: Changes
    alone: bool

    def run(self, x: Batch, sink: Sink) -> None:
        """See BuiltExtractor."""
        self.extractor.run_with(self.changes.again(), x, sink, alone=self.alone)


@dataclass(frozen=True, eq=False)
class ChangedGradients:
    """A gradient extractor with an objective's operands and interventions, a ``BuiltExtractor``.

    Attributes:
        extractor: The extractor.
        operands: The operands.
        changes: The interventions.
        alone: Whether each item needs a pass of its own.
    """

    extractor: GradientExtractor
    operands: Operands
    changes: Changes
    alone: bool

    def run(self, x: Batch, sink: Sink) -> None:
        """See BuiltExtractor."""
        changes = self.changes.again()
        alone = self.alone or not self.extractor.shapes.takes_batches
        if x.size > 1 and alone:
            if changes.mix_items:
                raise ExtractorUnsupportedError(
                    "interventions: the items of a batch influence each other in this model, so "
                    "gradients are computed for each item alone, where nothing can be taken from "
                    "another item"
                )
            self.extractor.run_alone(self.operands, x, sink, changes)
        else:
            self.extractor.run_with(self.operands, x, sink, alone=alone, changes=changes)
        changes.finish(sink, len(self.extractor.points))
