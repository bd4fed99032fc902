"""Rows of .npy files, one for each item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layertap.dataset.addresses import is_address, open_address, read_range
from layertap.dataset.sources.source import Source, file_stamp, printable
from layertap.errors import InvalidInputError

if TYPE_CHECKING:
    from layertap.inputs import InputLike

__all__ = ["ArrayRows", "NamedArrayRows"]


class NamedArrayRows(Source):
    """Rows of arrays, one array for each input of the model; the ids are ``0``, ``1`` and so on.

    The files are mapped into memory, so that only the rows of the batches in flight are read.

    Args:
        files: The path of each input's array, by the input's name; the name may be empty for the
            only input that the model needs.

    Raises:
        InvalidInputError: If a file can't be read, or the arrays have different numbers of rows.
    """

    noun = "items"

    def __init__(self, files: Mapping[str, str]) -> None:
        self._files = files
        self._stamp = " ".join(file_stamp(file) for file in files.values())
        self._arrays = {name: _mapped(file) for name, file in files.items()}
        rows = {name: len(array) for name, array in self._arrays.items()}
        if len(set(rows.values())) > 1:
            each = ", ".join(f"{count} of {name!r}" for name, count in rows.items())
            raise InvalidInputError(f"inputs: got rows of {each}, expected one number for all")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self._arrays.values())))

    def id(self, index: int) -> str:
        """See Source."""
        return str(index)

    def stamp(self, index: int) -> str:
        """See Source."""
        del index
        return self._stamp

    def read(self, index: int) -> dict[str, np.ndarray]:
        """See Source."""
        return {name: array[index] for name, array in self._arrays.items()}

    def batch(self, contents: Sequence[Any]) -> InputLike:
        """See Source."""
        stacked = {name: np.stack([row[name] for row in contents]) for name in self._arrays}
        return stacked[""] if list(stacked) == [""] else stacked

    def nbytes(self, content: Any) -> int:
        """See Source."""
        return sum(row.nbytes for row in content.values())


class ArrayRows(NamedArrayRows):
    """Rows of one .npy file for the model's only input, with ids such as ``items.npy:0``.

    Args:
        file: The path of the file.

    Raises:
        InvalidInputError: If the file can't be read.
    """

    def __init__(self, file: str) -> None:
        super().__init__({"": file})
        self._name = printable(file)

    @property
    def row(self) -> tuple[tuple[int, ...], np.dtype]:
        """The shape and the dtype of a row."""
        array = self._arrays[""]
        return array.shape[1:], array.dtype

    def id(self, index: int) -> str:
        """See Source."""
        return f"{self._name}:{index}"


class _RemoteRows:
    """The rows of an .npy file at an address, each of which is read when it is needed.

    It has what is used of an array: its shape, its dtype, its length and single rows.
    """

    def __init__(self, address: str) -> None:
        with open_address(address) as file:
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if read is None:
                raise ValueError(f"version {version} of the format")
            self.shape, by_columns, self.dtype = read(file)
            self._begin = file.tell()
        if self.dtype.hasobject or (by_columns and len(self.shape) > 1):
            raise ValueError("objects, or an array in Fortran's order")
        self.ndim = len(self.shape)
        self._address = address

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, index: int) -> np.ndarray:
        row = self.shape[1:]
        size = int(np.prod(row, dtype=np.int64)) * self.dtype.itemsize
        raw = read_range(self._address, self._begin + index * size, size)
        if len(raw) < size:
            raise InvalidInputError(f"{self._address}: the file is cut off")
        return np.frombuffer(raw, self.dtype).reshape(row)


def _mapped(file: str) -> np.ndarray | _RemoteRows:
    if is_address(file):
        try:
            rows = _RemoteRows(file)
        except (ValueError, EOFError) as error:
            raise _no_array(file, error) from error
        if not rows.ndim:
            raise InvalidInputError(f"input {file}: expected an .npy file of an array with rows")
        return rows
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise InvalidInputError(f"input {file}: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:  # What numpy raises for a file that is no .npy file.
        raise _no_array(file, error) from error
    if not isinstance(array, np.ndarray) or not array.ndim:
        raise InvalidInputError(f"input {file}: expected an .npy file of an array with rows")
    return array


def _no_array(file: str, error: Exception) -> InvalidInputError:
    return InvalidInputError(f"input {file}: got no .npy file of numbers, expected one ({error})")
