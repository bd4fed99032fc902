"""Joins the replies of several batches and writes them to one .npz file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from layertap.errors import InvalidInputError
from layertap.selection import Extractor

__all__ = ["Columns"]


class Columns:
    """One array per output, joined from batches along the measured batch dimension.

    Args:
        axes: Returns, by output name, the dimension that grows with the batch; None if batches
            can't be joined. Called before the second batch is joined.
    """

    def __init__(self, axes: Callable[[], Mapping[str, int | None]]) -> None:
        self._axes = axes
        self._known: Mapping[str, int | None] = {}
        self._parts: dict[str, list[np.ndarray]] = {}
        self._joined: dict[str, np.ndarray] = {}
        self._extractor = ""

    def add(self, arrays: Mapping[str, np.ndarray], extractor: Extractor, items: int) -> None:
        """Add the outputs of a batch of this many items, by name.

        Raises:
            InvalidInputError: If there are several batches and they can't be joined.
        """
        if self._parts and not self._known:
            self._known = self._axes()
        self._extractor = extractor.value
        for name, array in arrays.items():
            parts = self._parts.setdefault(name, [])
            parts.append(_storable(array))
            if len(parts) > 1 and not _fits(parts, self._known.get(name), items):
                raise InvalidInputError(
                    f"output {name!r}: batches of shapes {list(parts[-2].shape)} and "
                    f"{list(parts[-1].shape)} can't be joined, as no dimension is the number of "
                    f"images; raise --batch-size to the number of images, or extract them one by "
                    f"one"
                )

    def rows(self) -> Iterator[tuple[str, np.ndarray, str]]:
        """Yield the name, the array and the extractor of each output."""
        for name, array in self._arrays().items():
            yield name, array, self._extractor

    def save(self, path: Path) -> None:
        """Write the file, completely or not at all.

        It doesn't use ``np.savez``, which takes names as keyword arguments and has one of its own,
        called ``file``.

        Raises:
            InvalidInputError: If the file can't be written.
        """
        beside = path.with_name(f"{path.name}.part")
        try:
            with beside.open("wb") as file:
                with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                    for name, array in self._arrays().items():
                        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                            np.lib.format.write_array(member, array, allow_pickle=False)
                file.flush()
                # A disk may report only now that it is full.
                os.fsync(file.fileno())
            beside.replace(path)
        except OSError as error:
            raise InvalidInputError(f"output {path}: {error.strerror}") from error
        finally:
            # After any exception, including Ctrl-C. If the disk is read-only, for example, nothing
            # was written and nothing can be removed.
            with suppress(OSError):
                beside.unlink()

    def _arrays(self) -> dict[str, np.ndarray]:
        for name in self._parts.keys() - self._joined.keys():
            parts = self._parts[name]
            # A single batch is stored unchanged, whatever its axes mean.
            axis = self._known.get(name) or 0
            self._joined[name] = parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
        return {name: self._joined[name] for name in self._parts}


def _storable(array: np.ndarray) -> np.ndarray:
    """Return the array; bfloat16, which .npz lacks, as float32, which can hold all its values."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _fits(parts: list[np.ndarray], axis: int | None, items: int) -> bool:
    before, now = parts[-2:]
    if axis is None or not axis < now.ndim == before.ndim or now.shape[axis] % items:
        return False
    others = [size for index, size in enumerate(now.shape) if index != axis]
    return others == [size for index, size in enumerate(before.shape) if index != axis]
