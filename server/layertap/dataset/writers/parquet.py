"""Shards in Parquet files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from layertap.dataset.shard import Output, Rows
from layertap.dataset.writers.base import ShardedFormat

__all__ = ["Parquet", "table_of"]


class Parquet(ShardedFormat):
    """A folder of ``part-00000.parquet``: the column ``ids`` first, then one for each output.

    A row of an output is a fixed-size list of its values; the shape is in the field's metadata,
    under ``shape``, as a JSON list. An output with one number for each item is a plain column. The
    values of a ragged output are a list of such.
    """

    name = "parquet"
    suffixes = (".parquet",)
    library = "pyarrow"

    def write(self, path: Path, rows: Rows, outputs: Mapping[str, Output]) -> None:
        """See ShardedFormat."""
        import pyarrow.parquet as pq

        # Dictionaries are for values that repeat; those of layers don't.
        table = table_of(rows, outputs)
        pq.write_table(table, path, use_dictionary=False, compression="zstd")


def table_of(rows: Rows, outputs: Mapping[str, Output]) -> Any:
    """Return rows as an Arrow table; see ``Parquet``."""
    import pyarrow as pa

    fields = [pa.field("ids", pa.string(), nullable=False)]
    columns: list[Any] = [pa.array(list(rows.ids), pa.string())]
    for name, output in outputs.items():
        column = _column(rows.arrays[name], output)
        if output.ragged:
            column = pa.LargeListArray.from_arrays(pa.array(rows.offsets[name]), column)
        metadata = {"shape": json.dumps(list(output.shape))}
        fields.append(pa.field(name, column.type, metadata=metadata))
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def _column(array: np.ndarray, output: Output) -> Any:
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    if not output.shape:
        return flat
    size = int(np.prod(output.shape, dtype=np.int64))
    return pa.FixedSizeListArray.from_arrays(flat, size)
