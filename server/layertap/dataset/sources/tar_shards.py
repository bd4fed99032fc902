"""Samples of tar files, as WebDataset writes them."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from layertap.dataset.sources.content import ArrayContent, Content, ImageContent, TextContent
from layertap.dataset.sources.files import IMAGE_SUFFIXES
from layertap.dataset.sources.source import (
    Source,
    file_range,
    file_stamp,
    open_file,
    printable,
)
from layertap.errors import InvalidInputError
from layertap.texts import Truncation

if TYPE_CHECKING:
    from layertap.inputs import InputLike

__all__ = ["TarSamples"]

_IMAGES = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)


class _Member(NamedTuple):
    """One file in the tar file."""

    key: str
    field: str
    begin: int
    size: int


class TarSamples(Source):
    """The samples of a tar file. The files of a sample have one name up to its first dot, the key.

    Only the headers are read at first. An item is one file of each sample: its image, or else its
    .npy array, or else its .txt text.

    Args:
        path: The path of the tar file, which is not compressed.
        field: What follows the first dot of the files to take, such as ``"jpg"``; if empty, it is
            found.
        truncation: Where a text with too many tokens is cut.

    Raises:
        InvalidInputError: If the file can't be read, or it is not clear which files to take.
    """

    def __init__(
        self, path: str, field: str = "", truncation: Truncation = Truncation.NONE
    ) -> None:
        self._path = path
        self._stamp = file_stamp(path)
        samples = list(_samples(path))
        wanted = _fields(path, samples, field)
        self._content = _content(wanted, truncation)
        self.noun = self._content.noun
        self._field = "/".join(sorted(wanted))
        self._items = [_chosen(path, key, members, wanted) for key, members in samples]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._items)

    def id(self, index: int) -> str:
        """Return the key."""
        return self._items[index].key

    def stamp(self, index: int) -> str:
        """See Source."""
        item = self._items[index]
        return f"{self._stamp} {item.begin} {item.size}"

    def read(self, index: int) -> Any:
        """See Source."""
        item = self._items[index]
        if item.size < 0:
            raise InvalidInputError(f"the sample has no {self._field}")
        raw = file_range(self._path, item.begin, item.size)
        if len(raw) < item.size:
            raise InvalidInputError(f"{self._path}: the file is cut off")
        return self._content.decode(raw)

    def batch(self, contents: Sequence[Any]) -> InputLike:
        """See Source."""
        return self._content.batch(contents)

    def nbytes(self, content: Any) -> int:
        """See Source."""
        return self._content.nbytes(content)


def _samples(path: str) -> Iterator[tuple[str, list[_Member]]]:
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            members = [
                _member(info.name, info.offset_data, info.size)
                for info in archive
                if info.isreg() and not os.path.basename(info.name).startswith(".")  # noqa: PTH119
            ]
    except OSError as error:
        raise InvalidInputError(f"tar file {path}: {error.strerror or error}") from error
    except tarfile.TarError as error:
        raise InvalidInputError(
            f"tar file {path}: {error}; expected one that is whole and not compressed"
        ) from error
    for key, group in groupby(members, lambda member: member.key):
        yield key, list(group)


def _member(name: str, begin: int, size: int) -> _Member:
    folder, slash, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return _Member(printable(f"{folder}{slash}{stem}"), field.lower(), begin, size)


def _fields(path: str, samples: Sequence[tuple[str, list[_Member]]], field: str) -> set[str]:
    """Return the fields of which each sample may have one."""
    if field:
        return {field.lower().removeprefix(".")}
    there = {member.field for _, members in samples for member in members}
    for group in (_IMAGES, {"npy"}, {"txt"}):
        if found := there & group:
            return found
    raise InvalidInputError(
        f"tar file {path}: got samples with {', '.join(sorted(there)) or 'no files'}, expected "
        f"{', '.join(sorted(_IMAGES))}, npy or txt"
    )


def _content(fields: set[str], truncation: Truncation) -> Content:
    ends = {field.rpartition(".")[2] for field in fields}
    if ends <= _IMAGES:
        return ImageContent()
    return ArrayContent() if ends == {"npy"} else TextContent(truncation)


def _chosen(path: str, key: str, members: Sequence[_Member], wanted: set[str]) -> _Member:
    found = [member for member in members if member.field in wanted]
    if len(found) > 1:
        names = " and ".join(member.field for member in found)
        raise InvalidInputError(f"tar file {path}: {key} has {names}; choose one by --field")
    return found[0] if found else _Member(key, "", 0, -1)
