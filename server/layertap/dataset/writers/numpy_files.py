"""``.npz``, and a folder of ``.npy`` files that can be mapped into memory."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO
from urllib.parse import quote

import numpy as np

from layertap.dataset.shard import OFFSETS, Parts, Rows
from layertap.dataset.writers.base import JoinedFormat

__all__ = ["Npy", "Npz", "write_part"]

_Member = tuple[str, np.dtype, tuple[int, ...], Iterable[np.ndarray]]
"""The name, dtype, shape and chunks of one array."""


class Npz(JoinedFormat):
    """One .npz file: an array for each output, and ``ids``."""

    name = "npz"
    suffixes = (".npz",)

    def join(self, path: Path, parts: Parts) -> None:
        """See JoinedFormat."""
        _write_npz(path, _members(parts))


class Npy(JoinedFormat):
    """A folder with an .npy file for each output, and ``ids.npy``.

    ``numpy.load(file, mmap_mode="r")`` maps one. Characters of a name that not every file system
    takes are written as in URLs: ``avgpool%3Ainput.npy``.
    """

    name = "npy"
    suffixes = (".npy",)

    def join(self, path: Path, parts: Parts) -> None:
        """See JoinedFormat."""
        path.mkdir()
        for name, dtype, shape, chunks in _members(parts):
            with (path / f"{quote(name, safe=' ')}.npy").open("wb") as file:
                _write_array(file, dtype, shape, chunks)


def write_part(path: Path, rows: Rows) -> None:
    """Write the rows of a shard, as ``Parts`` reads them."""
    arrays = {
        "ids": np.array(rows.ids, np.str_),
        **rows.arrays,
        **{name + OFFSETS: offsets for name, offsets in rows.offsets.items()},
    }
    _write_npz(path, ((name, a.dtype, a.shape, [a]) for name, a in arrays.items()))


def _members(parts: Parts) -> Iterator[_Member]:
    ids = np.array(parts.ids, np.str_)
    yield "ids", ids.dtype, ids.shape, [ids]
    for name, output, length, chunks in parts.arrays():
        yield name, np.dtype(output.dtype), (length, *output.shape), chunks


def _write_npz(path: Path, members: Iterable[_Member]) -> None:
    """Write an .npz file.

    It doesn't use ``np.savez``, which takes names as keyword arguments, has one of its own, called
    ``file``, and needs all arrays at once.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, dtype, shape, chunks in members:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                _write_array(member, dtype, shape, chunks)


def _write_array(
    file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...], chunks: Iterable[np.ndarray]
) -> None:
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(file, header)
    for chunk in chunks:
        dense = np.ascontiguousarray(chunk)
        if dense.size:
            file.write(dense.reshape(-1).view(np.uint8).data)
