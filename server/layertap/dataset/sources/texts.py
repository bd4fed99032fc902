"""Texts, one for each item."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from layertap.dataset.sources.source import Source, file_bytes, printable
from layertap.errors import InvalidInputError
from layertap.texts import Texts, Truncation

if TYPE_CHECKING:
    from layertap.inputs import InputLike

__all__ = ["TextItems", "lines_of"]


class TextItems(Source):
    """Texts in memory.

    Args:
        texts: The id and the text of each item.
        truncation: Where a text with too many tokens is cut.
    """

    noun = "texts"

    def __init__(
        self, texts: Sequence[tuple[str, str]], truncation: Truncation = Truncation.NONE
    ) -> None:
        self._texts = texts
        self._truncation = truncation

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._texts)

    def id(self, index: int) -> str:
        """See Source."""
        return self._texts[index][0]

    def stamp(self, index: int) -> str:
        """See Source."""
        text = self._texts[index][1].encode("utf-8", "surrogatepass")
        return hashlib.blake2b(text, digest_size=8).hexdigest()

    def read(self, index: int) -> str:
        """See Source."""
        return self._texts[index][1]

    def batch(self, contents: Sequence[Any]) -> InputLike:
        """See Source."""
        return Texts(contents, self._truncation)


def lines_of(path: str) -> list[tuple[str, str]]:
    """Return the lines of a UTF-8 file that are not empty, with ids such as ``texts.txt:3``.

    The number is that of the line, from 1.

    Raises:
        InvalidInputError: If the file can't be read.
    """
    try:
        lines = file_bytes(path).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"texts {path}: it is not UTF-8") from error
    except InvalidInputError as error:
        raise InvalidInputError(f"texts {path}: {error.detail}") from error
    name = printable(path)
    return [(f"{name}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
