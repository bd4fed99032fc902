"""Runs a model on the rows of a Ray data set."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from layertap.dataset.batches import Batches, Way
from layertap.dataset.rows import RowRules
from layertap.dataset.runners import LocalRunner
from layertap.dataset.sources import Source
from layertap.dataset.sources.content import ArrayContent, Content, ImageContent, TextContent
from layertap.errors import InvalidInputError
from layertap.selection import (
    Extractor,
    LayerSelection,
    SelectionLike,
    as_extractor,
    parse_selections,
)

if TYPE_CHECKING:
    import ray.data

    from layertap.inputs import InputLike

__all__ = ["LayerActor", "arguments_of", "extract"]

_log = logging.getLogger(__name__)

Columns = Mapping[str, np.ndarray]
"""A batch of rows: an array ``[rows, ...]`` for each column, of objects for bytes and strings."""


def extract(
    dataset: ray.data.Dataset,
    model: str,
    layers: SelectionLike,
    *,
    column: str,
    id_column: str = "",
    extractor: Extractor | str = "hook",
    on_error: Literal["fail", "skip"] = "fail",
    batch_size: int = 16,
    actors: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    **settings: Any,
) -> ray.data.Dataset:
    """Return a data set with a column for each layer, in place of the column of the input.

    All other columns stay. Nothing runs before the rows of the result are used. Each actor loads
    the model once.

    Args:
        dataset: The rows.
        model: The model, as ``layertap.load`` takes it.
        layers: The layers, as for ``LocalModel.extract``.
        column: The column of the model's input: encoded images (bytes), pixels ``[H, W, 3] uint8``
            of a model with image preprocessing, texts (strings), or arrays, each one item.
        id_column: A column with the name of each row, for messages.
        extractor: The extractor of all passes. It should be named, as actors that choose for
            themselves may give other last bits.
        on_error: Whether a row that fails ends the run, or is left out and logged.
        batch_size: Rows in one pass.
        actors: The number of processes that hold the model.
        num_cpus: The cores of each actor.
        num_gpus: The GPUs of each actor; with any, the model runs there.
        settings: Further arguments of ``layertap.load``, such as ``weights``.

    Raises:
        InvalidInputError: For a reduction that gives items of different lengths, or a layer that is
            named twice, or like a column. Rows that fail raise it in the actor, and Ray wraps it.
    """
    import ray.data

    arguments = arguments_of(
        model=model,
        layers=layers,
        column=column,
        id_column=id_column,
        extractor=extractor,
        on_error=on_error,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        settings=settings,
    )
    return dataset.map_batches(
        LayerActor,
        fn_constructor_kwargs=arguments,
        batch_size=batch_size,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )


def arguments_of(
    *,
    model: str,
    layers: SelectionLike,
    column: str,
    id_column: str,
    extractor: Extractor | str,
    on_error: str,
    num_cpus: float,
    num_gpus: float,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments of ``LayerActor``; see ``extract`` for those of this function.

    Raises:
        InvalidInputError: For a reduction that gives items of different lengths.
    """
    selections = parse_selections(layers)
    ragged = next((each for each in selections if each.reduction.ragged), None)
    if ragged is not None:
        raise InvalidInputError(
            f"layers: got {ragged.text!r}, whose items have different lengths, expected a "
            f"reduction to one shape, such as {ragged.layer}:reduce=global_average_pool"
        )
    return {
        "model": model,
        "selections": selections,
        "column": column,
        "id_column": id_column,
        "extractor": as_extractor(extractor),
        "skip": on_error == "skip",
        "settings": {
            "device": "cuda" if num_gpus else "cpu",
            "threads": max(1, int(num_cpus)),
            **settings,
        },
    }


class LayerActor:
    """Holds the model, and runs it on batches; see ``extract`` for the arguments."""

    def __init__(
        self,
        *,
        model: str,
        selections: Sequence[LayerSelection],
        column: str,
        id_column: str,
        extractor: Extractor,
        skip: bool,
        settings: Mapping[str, Any],
    ) -> None:
        import layertap

        self._runner = LocalRunner(layertap.load(model, **settings))
        self._worker = self._runner.workers()[0]
        described = self._runner.describe()
        self._rules = RowRules.of(described, selections)
        self._preprocesses = any(each.preprocessing for each in described.inputs)
        self._selections = selections
        self._column, self._id_column = column, id_column
        self._way, self._skip = Way(extractor), skip

    def fingerprint(self) -> str:
        """Return a digest of the model's structure and weights."""
        return self._runner.fingerprint()

    def __call__(self, batch: Columns) -> dict[str, np.ndarray]:
        """Return the rows with their layers."""
        if self._column not in batch:
            raise InvalidInputError(
                f"column: got {self._column!r}, expected one of {', '.join(batch)}"
            )
        source = _Column(batch, self._column, self._id_column, pixels=self._preprocesses)
        kept = {name: array for name, array in batch.items() if name != self._column}
        found = self._run(source)
        if taken := kept.keys() & found.keys():
            raise InvalidInputError(
                f"layers: {min(taken)!r} is the name of a column; give the layer another one, such "
                f"as {min(taken)}=value"
            )
        places = found.pop("", None)
        rows = {name: array if places is None else array[places] for name, array in kept.items()}
        return rows | found

    def _run(self, source: _Column) -> dict[str, np.ndarray]:
        """Return the layers; under an empty name the indices of the rows, if some failed."""
        batches = Batches(source, self._selections, self._rules, skip=self._skip)
        each = 1 if self._rules.one_by_one else len(source)
        places: list[int] = []
        parts: list[Mapping[str, np.ndarray]] = []
        for begin in range(0, len(source), each):
            result = batches.run(self._worker, range(begin, begin + each), self._way)
            for failure in result.failures:
                _log.warning("row %s failed and is left out: %s", failure.id, failure.error)
            if result.items:
                places += result.items
                parts.append(result.rows)
        if not parts:
            return {"": np.array([], np.int64)}
        found = {name: _plain(np.concatenate([part[name] for part in parts])) for name in parts[0]}
        return found if len(places) == len(source) else {**found, "": np.array(places)}


def _plain(array: np.ndarray) -> np.ndarray:
    """Return an array of a dtype that Arrow has."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


class _Column(Source):
    """The values of a column as items."""

    def __init__(self, batch: Columns, column: str, id_column: str, *, pixels: bool) -> None:
        self._values = batch[column]
        self._ids = batch[id_column] if id_column else None
        self._content = _content(self._values, pixels)
        self.noun = self._content.noun

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._values)

    def id(self, index: int) -> str:
        """Return the row's name, or its place in the batch."""
        return str(index if self._ids is None else self._ids[index])

    def stamp(self, index: int) -> str:
        """See Source."""
        del index
        return ""

    def read(self, index: int) -> Any:
        """See Source."""
        value = self._values[index]
        if value is None:
            raise InvalidInputError("the row has no value")
        if isinstance(self._content, ImageContent) and isinstance(value, np.ndarray):
            from PIL import Image

            return Image.fromarray(value)
        return value

    def batch(self, contents: Sequence[Any]) -> InputLike:
        """See Source."""
        return self._content.batch(contents)

    def nbytes(self, content: Any) -> int:
        """See Source."""
        del content
        return 0


def _content(values: np.ndarray, pixels: bool) -> Content:
    first = next((each for each in values if each is not None), None)
    if isinstance(first, str):
        return TextContent()
    is_image = isinstance(first, np.ndarray) and first.dtype == np.uint8 and first.shape[2:] == (3,)
    if isinstance(first, bytes) or (pixels and is_image):
        return ImageContent()
    return ArrayContent()
