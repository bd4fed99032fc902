"""HDF5 files."""

from __future__ import annotations

from pathlib import Path

from layertap.dataset.shard import Parts
from layertap.dataset.writers.base import JoinedFormat

__all__ = ["Hdf5"]


class Hdf5(JoinedFormat):
    """One HDF5 file: a data set for each output, and ``ids``, strings in UTF-8."""

    name = "hdf5"
    suffixes = (".h5", ".hdf5")
    library = "h5py"

    def join(self, path: Path, parts: Parts) -> None:
        """See JoinedFormat."""
        import h5py

        with h5py.File(path, "w", libver="v110", track_order=True) as file:
            file.create_dataset("ids", data=parts.ids, dtype=h5py.string_dtype(), track_times=False)
            for name, output, length, chunks in parts.arrays():
                data = file.create_dataset(
                    name, (length, *output.shape), output.dtype, track_times=False
                )
                begin = 0
                for chunk in chunks:
                    data[begin : begin + len(chunk)] = chunk
                    begin += len(chunk)
