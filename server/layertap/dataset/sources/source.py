"""What a model is run on: items in a fixed order, each with an id."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from layertap.dataset.addresses import (
    address_stamp,
    is_address,
    open_address,
    read_address,
    read_range,
)
from layertap.errors import InvalidInputError

if TYPE_CHECKING:
    from layertap.inputs import InputLike

__all__ = [
    "Joined",
    "Part",
    "Source",
    "file_bytes",
    "file_range",
    "file_stamp",
    "open_file",
    "printable",
]


class Source(ABC):
    """Items in a fixed order. Safe to share between threads.

    Attributes:
        noun: What the items are called: ``"images"``, ``"recordings"``, ``"texts"`` or ``"items"``.
    """

    noun: str

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of items."""

    @abstractmethod
    def id(self, index: int) -> str:
        """Return the id of an item: printable, valid UTF-8, and unique in its source."""

    @abstractmethod
    def stamp(self, index: int) -> str:
        """Return what changes if the item's content does, such as its file's size and time."""

    @abstractmethod
    def read(self, index: int) -> Any:
        """Return the content of an item, in the form that ``batch`` takes.

        Raises:
            InvalidInputError: If it can't be read.
        """

    @abstractmethod
    def batch(self, contents: Sequence[Any]) -> InputLike:
        """Return the contents of several items as one input of a model."""

    def nbytes(self, content: Any) -> int:
        """Return the bytes of memory that the content of one item takes."""
        return len(content)

    def digest(self, begin: int, end: int) -> str:
        """Return a digest of the ids and stamps of a range of items."""
        digest = hashlib.sha256()
        for index in range(begin, end):
            digest.update(f"{self.id(index)}\0{self.stamp(index)}\n".encode())
        return digest.hexdigest()


class Joined(Source):
    """Several sources of the same kind, one after the other.

    Args:
        sources: The sources; at least one.

    Raises:
        InvalidInputError: If they are of different kinds.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.noun = sources[0].noun
        other = next((each for each in sources if each.noun != self.noun), None)
        if other is not None:
            raise InvalidInputError(
                f"inputs: got {self.noun} and {other.noun}, expected items of one kind"
            )
        self._sources = sources
        self._ends = list(accumulate(len(each) for each in sources))

    def __len__(self) -> int:
        """Return the number of items."""
        return self._ends[-1]

    def id(self, index: int) -> str:
        """See Source."""
        source, place = self._find(index)
        return source.id(place)

    def stamp(self, index: int) -> str:
        """See Source."""
        source, place = self._find(index)
        return source.stamp(place)

    def read(self, index: int) -> Any:
        """See Source."""
        source, place = self._find(index)
        return source.read(place)

    def batch(self, contents: Sequence[Any]) -> InputLike:
        """See Source."""
        return self._sources[0].batch(contents)

    def nbytes(self, content: Any) -> int:
        """See Source."""
        return self._sources[0].nbytes(content)

    def _find(self, index: int) -> tuple[Source, int]:
        number = bisect_right(self._ends, index)
        return self._sources[number], index - (self._ends[number - 1] if number else 0)


class Part(Source):
    """One of several parts of a source, which are consecutive and equally long.

    Args:
        source: The whole.
        number: Which part, from 1.
        count: The number of parts.

    Raises:
        InvalidInputError: If there is no such part, or it has no items.
    """

    def __init__(self, source: Source, number: int, count: int) -> None:
        if not 1 <= number <= count:
            raise InvalidInputError(
                f"part: got {number}/{count}, expected 1/{count} to {count}/{count}"
            )
        self._begin = len(source) * (number - 1) // count
        self._end = len(source) * number // count
        if self._begin == self._end:
            raise InvalidInputError(
                f"part: {number}/{count} of {len(source)} {source.noun} has none; use fewer parts"
            )
        self.noun = source.noun
        self._source = source

    def __len__(self) -> int:
        """Return the number of items of the part."""
        return self._end - self._begin

    def id(self, index: int) -> str:
        """See Source."""
        return self._source.id(self._begin + index)

    def stamp(self, index: int) -> str:
        """See Source."""
        return self._source.stamp(self._begin + index)

    def read(self, index: int) -> Any:
        """See Source."""
        return self._source.read(self._begin + index)

    def batch(self, contents: Sequence[Any]) -> InputLike:
        """See Source."""
        return self._source.batch(contents)

    def nbytes(self, content: Any) -> int:
        """See Source."""
        return self._source.nbytes(content)


def file_stamp(path: str | Path) -> str:
    """Return the size of a file and the time of its last change; empty if there is no such file."""
    if isinstance(path, str) and is_address(path):
        return address_stamp(path)
    try:
        stat = os.stat(path)  # noqa: PTH116 - faster than a Path for a million files
    except OSError:
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"


def file_bytes(path: str) -> bytes:
    """Return the content of a file or an address.

    Raises:
        InvalidInputError: If it is not there, or can't be read.
        UnavailableError: If it is at an address that can't be reached.
    """
    if is_address(path):
        return read_address(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidInputError(error.strerror or str(error)) from error


def file_range(path: str, begin: int, size: int) -> bytes:
    """Return some bytes of a file; fewer if it ends before. For errors see ``file_bytes``."""
    if is_address(path):
        return read_range(path, begin, size)
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(file, size, begin)
        finally:
            os.close(file)
    except OSError as error:
        raise InvalidInputError(f"{path}: {error.strerror}") from error


def open_file(path: str) -> IO[bytes]:
    """Open a file or an address for reading at any place.

    Raises:
        OSError: If a file can't be opened.
        InvalidInputError, UnavailableError: If an address can't be opened; see ``file_bytes``.
    """
    if is_address(path):
        return cast("IO[bytes]", open_address(path))
    return Path(path).open("rb")


def printable(name: str) -> str:
    r"""Return a file's name as UTF-8: bytes that are none are written ``\xff``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
