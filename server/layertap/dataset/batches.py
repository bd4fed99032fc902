"""Runs the model on a batch of items, and finds the items that fail."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from layertap.dataset.changed import Changed, added_up
from layertap.dataset.manifest import Failure
from layertap.dataset.rows import RowRules
from layertap.dataset.runners import Answer, Worker
from layertap.dataset.sources import Source
from layertap.errors import ExtractorUnsupportedError, InvalidInputError, ModelRunError
from layertap.selection import Extractor, LayerSelection
from layertap.timings import Timings

if TYPE_CHECKING:
    from layertap.inputs import InputLike

__all__ = ["BatchResult", "Batches", "Way"]

_ITEM_ERRORS = (InvalidInputError, ModelRunError)
"""What an item may be at fault for. All other errors end the run."""


@dataclass(frozen=True, slots=True)
class Way:
    """How layers of a batch are captured.

    Attributes:
        extractor: The extractor to use.
        variant: How its program is finished; empty for the usual way.
        fallback: Whether a batch that it can't serve is tried in the usual way, and then by the
            next extractors in the order of `Extractor`.
    """

    extractor: Extractor
    variant: str = ""
    fallback: bool = False

    def others(self) -> list[Extractor]:
        """Return the extractors to try for a batch that can't be served so."""
        if not self.fallback:
            return []
        order = list(Extractor)
        following = order[order.index(self.extractor) + 1 :]
        usual = [self.extractor] if self.variant else []
        return usual + [each for each in following if each.automatic]


@dataclass(slots=True)
class BatchResult:
    """What became of a batch.

    Attributes:
        items: The indices of the items that have rows.
        rows: By output name, the rows ``[items, ...]``.
        failures: The items that failed.
        extractor: The extractor that served it; AUTO if nothing did.
        variant: How its program is finished; empty for the usual way.
        read_seconds: How long reading took.
        input_bytes: The size of what was read.
        timings: The timings of the pass.
        changed: What each intervention changed.
    """

    items: list[int] = field(default_factory=list)
    rows: Mapping[str, np.ndarray] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    extractor: Extractor = Extractor.AUTO
    variant: str = ""
    read_seconds: float = 0.0
    input_bytes: int = 0
    timings: Timings = field(default_factory=Timings)
    changed: tuple[Changed, ...] = ()


class Batches:
    """Runs batches of a source's items. Safe to share between threads.

    Args:
        source: The items.
        selections: The layers to take.
        rules: How values are divided into items.
        skip: Whether items that fail are left out; otherwise the first one raises.
    """

    def __init__(
        self, source: Source, selections: Sequence[LayerSelection], rules: RowRules, *, skip: bool
    ) -> None:
        self._source = source
        self._selections = tuple(selections)
        self._rules = rules
        self._skip = skip

    def run(self, worker: Worker, items: Sequence[int], way: Way) -> BatchResult:
        """Read items and run the model on them.

        Args:
            worker: Runs the model.
            items: The indices of the items.
            way: How to capture the layers.

        Raises:
            InvalidInputError: An item failed, and failing items are not skipped.
            LayertapError: The run can't go on.
        """
        result = BatchResult()
        contents = self._read(items, result)
        while contents:
            try:
                self._ask(worker, contents, way, result)
            except _ITEM_ERRORS as error:
                at = error.image if isinstance(error, InvalidInputError) else None
                if at is None or at >= len(contents):
                    self._alone(worker, contents, way, result)
                    break
                index = list(contents)[at]
                self._fail(index, _detail(error), result, error)
                del contents[index]
            else:
                break
        order = {self._source.id(index): place for place, index in enumerate(items)}
        result.failures.sort(key=lambda failure: order[failure.id])
        return result

    def _read(self, items: Sequence[int], result: BatchResult) -> dict[int, Any]:
        begin = time.perf_counter()
        contents = {}
        for index in items:
            try:
                contents[index] = self._source.read(index)
            except InvalidInputError as error:
                self._fail(index, str(error), result, error)
        result.input_bytes = sum(map(self._source.nbytes, contents.values()))
        result.read_seconds = time.perf_counter() - begin
        return contents

    def _ask(
        self,
        worker: Worker,
        contents: Mapping[int, Any],
        way: Way,
        result: BatchResult,
    ) -> None:
        given = self._source.batch(list(contents.values()))
        answer = self._answer(worker, given, way)
        count = len(contents)
        result.rows = {
            name: self._rules.rows(name, array, count) for name, array in answer.arrays.items()
        }
        result.items = list(contents)
        result.extractor, result.variant = answer.extractor, answer.variant
        result.timings = answer.timings
        result.changed = answer.changed

    def _answer(self, worker: Worker, given: InputLike, way: Way) -> Answer:
        try:
            return worker.ask(given, self._selections, way.extractor, way.variant)
        except ExtractorUnsupportedError:
            for other in way.others():
                with suppress(ExtractorUnsupportedError):
                    return worker.ask(given, self._selections, other)
            raise

    def _alone(
        self,
        worker: Worker,
        contents: Mapping[int, Any],
        way: Way,
        result: BatchResult,
    ) -> None:
        """Run each item by itself, as the error does not say which one is at fault."""
        rows: list[Mapping[str, np.ndarray]] = []
        changed: list[tuple[Changed, ...]] = []
        kept: list[int] = []
        for index, content in contents.items():
            try:
                self._ask(worker, {index: content}, way, result)
            except _ITEM_ERRORS as error:
                self._fail(index, _detail(error), result, error)
            else:
                rows.append(result.rows)
                changed.append(result.changed)
                kept.append(index)
        result.items = kept
        result.changed = added_up(changed)
        if kept:
            result.rows = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _fail(self, index: int, detail: str, result: BatchResult, error: Exception) -> None:
        name = self._source.id(index)
        if not self._skip:
            what = self._source.noun.removesuffix("s")
            raise InvalidInputError(f"{what} {name}: {detail}") from error
        result.failures.append(Failure(name, detail))


def _detail(error: Exception) -> str:
    return error.detail if isinstance(error, InvalidInputError) else str(error)
