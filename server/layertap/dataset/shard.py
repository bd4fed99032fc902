"""The rows of a range of items, as they are filled, written and read again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from layertap.errors import InvalidInputError

__all__ = ["OFFSETS", "Output", "Parts", "Rows", "ShardBuffer"]

OFFSETS = ".offsets"
"""The suffix of the array that says where the values of each item begin in a ragged output."""


@dataclass(frozen=True, slots=True)
class Output:
    """One output of every item.

    Attributes:
        dtype: The dtype in which it is stored.
        shape: The shape for one item; if ragged, that of one of its values.
        ragged: Whether items have different numbers of values.
    """

    dtype: str
    shape: tuple[int, ...]
    ragged: bool = False

    @property
    def nbytes(self) -> int:
        """The bytes of one item, or of one value if ragged."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of some items in order.

    Attributes:
        ids: The id of each item.
        arrays: By output name, ``[items, ...]``; if ragged, the values of all items ``[sum, ...]``.
        offsets: For each ragged output, where each item's values begin, and the end ``[items + 1]``
            int64.
    """

    ids: Sequence[str]
    arrays: Mapping[str, np.ndarray]
    offsets: Mapping[str, np.ndarray]


class ShardBuffer:
    """Collects the rows of a range of items, in any order of batches.

    Not safe to share, except that different batches may be placed at the same time.

    Args:
        ids: The ids of the items in the range.
        outputs: What each item has.
    """

    def __init__(self, ids: Sequence[str], outputs: Mapping[str, Output]) -> None:
        self._ids = ids
        self._outputs = outputs
        self._there = np.zeros(len(ids), bool)
        self._arrays = {
            name: np.empty((len(ids), *output.shape), output.dtype)
            for name, output in outputs.items()
            if not output.ragged
        }
        self._ragged: dict[str, dict[int, np.ndarray]] = {
            name: {} for name, output in outputs.items() if output.ragged
        }

    def place(self, places: Sequence[int], rows: Mapping[str, np.ndarray]) -> None:
        """Copy the rows of some items to their places.

        Raises:
            InvalidInputError: If they don't have the outputs, shapes and dtypes of other items.
        """
        for name, output in self._outputs.items():
            self._check(name, output, rows[name], self._ids[places[0]])
        for name, array in self._arrays.items():
            array[list(places)] = rows[name]
        for name, parts in self._ragged.items():
            parts.update(
                (place, np.array(row)) for place, row in zip(places, rows[name], strict=True)
            )
        self._there[list(places)] = True

    def _check(self, name: str, output: Output, rows: np.ndarray, item: str) -> None:
        shape = rows.shape[2:] if output.ragged else rows.shape[1:]
        if shape != output.shape:
            raise InvalidInputError(
                f"output {name!r}: got the shape {list(shape)} for {item}, and "
                f"{list(output.shape)} for the first items, expected one shape for all; a "
                f"reduction such as {name}:reduce=global_average_pool gives it"
            )

    def rows(self) -> Rows:
        """Return the rows of the items that were placed."""
        kept = np.flatnonzero(self._there).tolist()
        whole = len(kept) == len(self._ids)
        arrays = {n: array if whole else array[kept] for n, array in self._arrays.items()}
        offsets: dict[str, np.ndarray] = {}
        for name, parts in self._ragged.items():
            output = self._outputs[name]
            lengths = [len(parts[place]) for place in kept]
            offsets[name] = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            empty = np.empty((0, *output.shape), output.dtype)
            joined = np.concatenate([empty, *(parts[place] for place in kept)])
            arrays[name] = joined.astype(output.dtype, copy=False)
        ordered = {name: arrays[name] for name in self._outputs}
        return Rows([self._ids[place] for place in kept], ordered, offsets)


class Parts:
    """The shards of a finished run, read one at a time to join them into one file.

    Args:
        files: The .npz file of each shard, in order.
        outputs: What each item has.
    """

    def __init__(self, files: Sequence[Path], outputs: Mapping[str, Output]) -> None:
        self._files = files
        self.outputs = outputs
        self.ids: list[str] = []
        counts: dict[str, int] = dict.fromkeys(outputs, 0)
        for file in files:
            with np.load(file, allow_pickle=False) as part:
                ids = part["ids"].tolist()
                self.ids += ids
                for name, output in outputs.items():
                    counts[name] += int(part[name + OFFSETS][-1]) if output.ragged else len(ids)
        self.lengths: Mapping[str, int] = counts

    def shards(self) -> Iterator[Rows]:
        """Yield the rows of each shard."""
        for file in self._files:
            with np.load(file, allow_pickle=False) as part:
                arrays = {name: part[name] for name in self.outputs}
                offsets = {
                    name: part[name + OFFSETS] for name, out in self.outputs.items() if out.ragged
                }
                yield Rows(part["ids"].tolist(), arrays, offsets)

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Yield the values of an output, a shard at a time."""
        for file in self._files:
            with np.load(file, allow_pickle=False) as part:
                yield part[name]

    def offsets(self, name: str) -> np.ndarray:
        """Return where each item's values of a ragged output begin, and the end."""
        begin = 0
        joined = [np.zeros(1, np.int64)]
        for file in self._files:
            with np.load(file, allow_pickle=False) as part:
                offsets = part[name + OFFSETS]
            joined.append(offsets[1:] + begin)
            begin += int(offsets[-1])
        return np.concatenate(joined)

    def arrays(self) -> Iterator[tuple[str, Output, int, Iterator[np.ndarray]]]:
        """Yield name, description, length and chunks of each array, the offsets included."""
        for name, output in self.outputs.items():
            yield name, output, self.lengths[name], self.chunks(name)
            if output.ragged:
                offsets = self.offsets(name)
                described = Output("int64", ())
                yield name + OFFSETS, described, len(offsets), iter([offsets])
