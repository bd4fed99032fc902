"""Files, one for each item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from layertap.dataset.sources.content import Content
from layertap.dataset.sources.source import Source, file_bytes, file_stamp, printable

if TYPE_CHECKING:
    from layertap.inputs import InputLike

__all__ = ["AUDIO_SUFFIXES", "IMAGE_SUFFIXES", "Files"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
"""The suffixes, in lower case, by which images are recognised in folders and tar files."""
AUDIO_SUFFIXES = frozenset({".wav", ".flac"})
"""The suffixes, in lower case, of recordings."""


class Files(Source):
    """Files of one kind; the id of each is its path as given.

    Args:
        paths: The paths.
        content: What the files have.
    """

    def __init__(self, paths: Sequence[str], content: Content) -> None:
        self._paths = paths
        self._content = content
        self.noun = content.noun

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._paths)

    def id(self, index: int) -> str:
        """See Source."""
        return printable(self._paths[index])

    def stamp(self, index: int) -> str:
        """See Source."""
        return file_stamp(self._paths[index])

    def read(self, index: int) -> Any:
        """See Source."""
        return self._content.decode(file_bytes(self._paths[index]))

    def batch(self, contents: Sequence[Any]) -> InputLike:
        """See Source."""
        return self._content.batch(contents)

    def nbytes(self, content: Any) -> int:
        """See Source."""
        return self._content.nbytes(content)
