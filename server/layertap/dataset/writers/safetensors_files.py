"""Shards in safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from layertap.dataset.shard import OFFSETS, Output, Rows
from layertap.dataset.writers.base import ShardedFormat

__all__ = ["Safetensors"]


class Safetensors(ShardedFormat):
    """A folder of ``part-00000.safetensors``: a tensor for each output.

    The ids are a JSON list under ``ids`` in the metadata of each file.
    """

    name = "safetensors"
    suffixes = (".safetensors",)
    library = "safetensors"
    bfloat16 = True

    def write(self, path: Path, rows: Rows, outputs: Mapping[str, Output]) -> None:
        """See ShardedFormat."""
        del outputs
        from safetensors.numpy import save_file

        arrays = {
            **rows.arrays,
            **{name + OFFSETS: offsets for name, offsets in rows.offsets.items()},
        }
        dense = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(dense, path, {"ids": json.dumps(list(rows.ids))})
