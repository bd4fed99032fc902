"""Zarr stores, version 3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from layertap.dataset.shard import Output, Parts
from layertap.dataset.writers.base import JoinedFormat

__all__ = ["Zarr"]

_CHUNK_BYTES = 1 << 20
_CHUNKS_OF_SHARD = 64


class Zarr(JoinedFormat):
    """A Zarr group, version 3: an array for each output, and ``ids``, strings.

    A chunk has whole rows of about 1 MiB together, and a file 64 chunks.
    """

    name = "zarr"
    suffixes = (".zarr",)
    library = "zarr"

    def join(self, path: Path, parts: Parts) -> None:
        """See JoinedFormat."""
        import zarr

        group = zarr.create_group(path, zarr_format=3)
        ids = group.create_array("ids", shape=(len(parts.ids),), dtype=str)
        ids[:] = np.array(parts.ids, object)
        for name, output, length, chunks in parts.arrays():
            chunk = min(max(1, _CHUNK_BYTES // max(1, output.nbytes)), max(1, length))
            rows = chunk * _CHUNKS_OF_SHARD
            array = group.create_array(
                name,
                shape=(length, *output.shape),
                dtype=output.dtype,
                chunks=(chunk, *output.shape),
                shards=(rows, *output.shape),
            )
            begin = 0
            for block in _aligned(chunks, rows, output):
                array[begin : begin + len(block)] = block
                begin += len(block)


def _aligned(chunks: Iterator[np.ndarray], rows: int, output: Output) -> Iterator[np.ndarray]:
    """Yield blocks of exactly this many rows, and the rest: a file is written only once so."""
    waiting: list[np.ndarray] = []
    count = 0
    for chunk in chunks:
        waiting.append(chunk)
        count += len(chunk)
        if count < rows:
            continue
        joined = np.concatenate(waiting)
        whole = count - count % rows
        for begin in range(0, whole, rows):
            yield joined[begin : begin + rows]
        waiting = [joined[whole:]]
        count -= whole
    if count:
        yield np.concatenate([np.empty((0, *output.shape), output.dtype), *waiting])
