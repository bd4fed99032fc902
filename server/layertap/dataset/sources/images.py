"""Image files, one for each item."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layertap.dataset.sources.source import Source, file_stamp, printable
from layertap.errors import InvalidInputError

if TYPE_CHECKING:
    from layertap.inputs import InputLike

__all__ = ["IMAGE_SUFFIXES", "ImageFiles", "Images"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
"""The suffixes, in lower case, by which images are recognised in folders and tar files."""


class Images(Source):
    """Items that are encoded images; what they are read from is the subclass's business."""

    noun = "images"

    def batch(self, contents: Sequence[Any]) -> InputLike:
        """See Source."""
        return list(contents)


class ImageFiles(Images):
    """Image files; the id of each is its path as given.

    Args:
        paths: The paths.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._paths)

    def id(self, index: int) -> str:
        """See Source."""
        return printable(self._paths[index])

    def stamp(self, index: int) -> str:
        """See Source."""
        return file_stamp(self._paths[index])

    def read(self, index: int) -> bytes:
        """See Source."""
        try:
            return Path(self._paths[index]).read_bytes()
        except OSError as error:
            raise InvalidInputError(error.strerror or str(error)) from error
