"""The formats of outputs."""

from __future__ import annotations

from pathlib import Path

from layertap.dataset.addresses import suffix_of
from layertap.dataset.writers.base import Format, JoinedFormat, ShardedFormat
from layertap.dataset.writers.hdf5 import Hdf5
from layertap.dataset.writers.lance_data import Lance
from layertap.dataset.writers.numpy_files import Npy, Npz, write_part
from layertap.dataset.writers.parquet import Parquet
from layertap.dataset.writers.safetensors_files import Safetensors
from layertap.dataset.writers.zarr_store import Zarr
from layertap.errors import ConfigError

__all__ = ["FORMATS", "Format", "JoinedFormat", "ShardedFormat", "format_of", "write_part"]

FORMATS: dict[str, Format] = {
    each.name: each for each in (Npz(), Npy(), Safetensors(), Parquet(), Lance(), Zarr(), Hdf5())
}
"""The formats by name."""


def format_of(output: str | Path, name: str = "") -> Format:
    """Return the format of an output, by its name or by the output's suffix.

    Raises:
        ConfigError: If there is no such format, or the library that it needs is missing.
    """
    if name:
        found = FORMATS.get(name)
        if found is None:
            raise ConfigError(f"format: got {name!r}, expected one of {', '.join(FORMATS)}")
    else:
        suffix = suffix_of(str(output).rstrip("/"))
        found = next((each for each in FORMATS.values() if suffix in each.suffixes), None)
        if found is None:
            known = ", ".join(suffix for each in FORMATS.values() for suffix in each.suffixes)
            got = f"the suffix {suffix!r}" if suffix else "no suffix"
            raise ConfigError(
                f"output {output}: got {got}, expected one of {known}, or the format by --format"
            )
    found.check_installed()
    return found
