"""Finds the items that a caller names: files, folders, globs and lists of these."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from layertap.dataset.addresses import found_at, is_address, suffix_of
from layertap.dataset.sources.arrays import ArrayRows
from layertap.dataset.sources.content import AudioContent, ImageContent
from layertap.dataset.sources.files import AUDIO_SUFFIXES, IMAGE_SUFFIXES, Files
from layertap.dataset.sources.parquet_rows import ParquetRows
from layertap.dataset.sources.source import Joined, Source, file_bytes, printable
from layertap.dataset.sources.tar_shards import TarSamples
from layertap.dataset.sources.texts import TextItems, lines_of
from layertap.errors import InvalidInputError
from layertap.texts import Truncation

__all__ = ["check_ids", "gather", "joined"]


@dataclass(frozen=True, slots=True)
class _How:
    """What to take of files that have several things.

    Attributes:
        truncation: Where a text with too many tokens is cut.
        field: The column of a Parquet file, or the part of a sample in a tar file.
    """

    truncation: Truncation
    field: str


def gather(
    inputs: Iterable[str], truncation: Truncation = Truncation.NONE, field: str = ""
) -> Source:
    """Return the items that paths name.

    Args:
        inputs: Image files; folders, whose image files are taken with those of all folders below,
            in the order of their names; globs such as ``"photos/**/*.jpg"``, for which the same
            order holds; ``.wav`` and ``.flac`` files; ``.npy`` files with an item in each row;
            ``.txt`` files with a text in each line; ``.tar`` files of samples (see
            ``TarSamples``); ``.parquet`` files (see ``ParquetRows``); ``"@FILE"`` for a file of
            such paths, one on each line, and ``"-"`` for the same from stdin; addresses of all of
            these such as ``"s3://bucket/photos"``, through fsspec. Paths in a list are
            separated by NUL instead if there is one, as ``find -print0`` writes them.
        truncation: Where a text with too many tokens is cut.
        field: The column of Parquet files, or the part of the samples in tar files.

    Raises:
        ConfigError: If a library that an input needs is missing.
        InvalidInputError: If something can't be read, there is no item, the items are of different
            kinds, or an id appears twice.
    """
    how = _How(truncation, field)
    return joined(
        [
            source
            for kind, paths in groupby(_expanded(inputs), _kind)
            for source in _KINDS[kind](list(paths), how)
        ]
    )


def joined(sources: Sequence[Source]) -> Source:
    """Return several sources as one.

    Raises:
        InvalidInputError: If there is no item, or an id appears twice.
    """
    whole = sources[0] if len(sources) == 1 else Joined(sources) if sources else None
    if whole is None or not len(whole):
        raise InvalidInputError("inputs: got no items, expected at least one")
    check_ids(whole)
    return whole


def check_ids(source: Source) -> None:
    """Raise InvalidInputError if two items have the same id, as no result could be told apart."""
    seen: set[str] = set()
    for index in range(len(source)):
        name = source.id(index)
        if name in seen:
            raise InvalidInputError(
                f"inputs: got {name!r} twice, expected different names: each row of the output "
                f"is found by its name"
            )
        seen.add(name)


def _kind(path: str) -> str:
    suffix = suffix_of(path)
    return suffix if suffix in _KINDS else ""


def _images(paths: list[str], how: _How) -> Iterator[Source]:
    del how
    yield Files(paths, ImageContent())


def _audio(paths: list[str], how: _How) -> Iterator[Source]:
    del how
    yield Files(paths, AudioContent())


def _arrays(paths: list[str], how: _How) -> Iterator[Source]:
    del how
    first = None
    for path in paths:
        source = ArrayRows(path)
        if first is not None and source.row != first:
            raise InvalidInputError(
                f"input {path}: got rows of {_row(source.row)}, expected those of the other "
                f"arrays, {_row(first)}"
            )
        first = source.row
        yield source


def _row(row: tuple[tuple[int, ...], object]) -> str:
    return f"{row[1]} {list(row[0])}"


def _texts(paths: list[str], how: _How) -> Iterator[Source]:
    for path in paths:
        yield TextItems(lines_of(path), how.truncation)


def _tar(paths: list[str], how: _How) -> Iterator[Source]:
    for path in paths:
        yield TarSamples(path, how.field, how.truncation)


def _parquet(paths: list[str], how: _How) -> Iterator[Source]:
    for path in paths:
        yield ParquetRows(path, how.field, how.truncation)


_KINDS: dict[str, Callable[[list[str], _How], Iterator[Source]]] = {
    "": _images,
    **dict.fromkeys(AUDIO_SUFFIXES, _audio),
    ".npy": _arrays,
    ".txt": _texts,
    ".tar": _tar,
    ".parquet": _parquet,
}


def _expanded(inputs: Iterable[str]) -> Iterator[str]:
    for given in inputs:
        if given == "-" or given.startswith("@"):
            for path in _listed(given):
                yield from _found(path)
        else:
            yield from _found(given)


def _found(path: str) -> Iterator[str]:
    """Yield the files that one path names."""
    if is_address(path):
        yield from _found_at(path)
        return
    place = Path(path)
    if place.is_dir():
        found = sorted(_images_below(path))
        if not found:
            expected = ", ".join(sorted(IMAGE_SUFFIXES))
            raise InvalidInputError(f"folder {printable(path)}: got no images ({expected})")
        yield from found
    elif place.exists():
        yield path
    elif glob.has_magic(path):
        # Path.glob takes no absolute patterns.
        names = glob.iglob(path, recursive=True)  # noqa: PTH207
        matches = sorted(each for each in names if Path(each).is_file())
        if not matches:
            raise InvalidInputError(f"glob {path}: no file matches")
        yield from matches
    else:
        raise InvalidInputError(f"input {printable(path)}: no such file")


def _found_at(address: str) -> list[str]:
    found = found_at(address, IMAGE_SUFFIXES)
    if found is None:
        raise InvalidInputError(f"input {printable(address)}: no such file, and no file matches")
    if not found:
        expected = ", ".join(sorted(IMAGE_SUFFIXES))
        raise InvalidInputError(f"folder {printable(address)}: got no images ({expected})")
    return found


def _images_below(folder: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise InvalidInputError(
            f"folder {printable(str(error.filename))}: {error.strerror}"
        ) from error

    for place, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            # Hidden files are another program's: macOS leaves ``._photo.jpg``, for example.
            if suffix_of(name) in IMAGE_SUFFIXES and not name.startswith("."):
                yield os.path.join(place, name)  # noqa: PTH118 - a million paths stay strings


def _listed(given: str) -> list[str]:
    """Return the paths in a list; they may hold any bytes."""
    try:
        raw = sys.stdin.buffer.read() if given == "-" else file_bytes(given[1:])
    except InvalidInputError as error:
        raise InvalidInputError(f"list {given[1:]}: {error.detail}") from error
    paths = raw.split(b"\0") if b"\0" in raw else raw.splitlines()
    return [os.fsdecode(path) for path in paths if path.strip()]
