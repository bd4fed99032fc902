"""The kinds of content that an item may have: an image, a recording, a text or an array."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from layertap.audio import Audio
from layertap.errors import InvalidInputError
from layertap.texts import Texts, Truncation

if TYPE_CHECKING:
    from layertap.inputs import InputLike

__all__ = ["ArrayContent", "AudioContent", "Content", "ImageContent", "TextContent"]


class Content(ABC):
    """How the bytes of an item become part of a model's input.

    Attributes:
        noun: What items of this kind are called.
    """

    noun: ClassVar[str]

    @abstractmethod
    def decode(self, raw: bytes) -> Any:
        """Return the content of an item, given the bytes of a file.

        Raises:
            InvalidInputError: If they are not of this kind.
        """

    @abstractmethod
    def batch(self, contents: Sequence[Any]) -> InputLike:
        """Return several items as one input of a model."""

    def nbytes(self, content: Any) -> int:
        """Return the bytes of memory that an item takes."""
        return len(content)


class ImageContent(Content):
    """Encoded images, which the model's own preprocessing decodes."""

    noun = "images"

    def decode(self, raw: bytes) -> bytes:
        """See Content."""
        return raw

    def batch(self, contents: Sequence[Any]) -> InputLike:
        """See Content."""
        return list(contents)


class AudioContent(Content):
    """Recordings in WAV or FLAC, which the model's own feature extractor converts."""

    noun = "recordings"

    def decode(self, raw: bytes) -> bytes:
        """See Content."""
        return raw

    def batch(self, contents: Sequence[Any]) -> InputLike:
        """See Content."""
        return Audio(list(contents))


class TextContent(Content):
    """Texts in UTF-8.

    Args:
        truncation: Where a text with too many tokens is cut.
    """

    noun = "texts"

    def __init__(self, truncation: Truncation = Truncation.NONE) -> None:
        self._truncation = truncation

    def decode(self, raw: bytes) -> str:
        """See Content."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidInputError("it is not UTF-8") from error

    def batch(self, contents: Sequence[Any]) -> InputLike:
        """See Content."""
        return Texts(contents, self._truncation)


class ArrayContent(Content):
    """Arrays, each one item of the model's only input."""

    noun = "items"

    def decode(self, raw: bytes) -> np.ndarray:
        """See Content; the bytes are those of an .npy file."""
        try:
            return np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise InvalidInputError(f"got no .npy file of numbers ({error})") from error

    def batch(self, contents: Sequence[Any]) -> InputLike:
        """See Content."""
        shape = next((each.shape for each in contents if each.shape != contents[0].shape), None)
        if shape is not None:
            raise InvalidInputError(
                f"got items of the shapes {list(contents[0].shape)} and {list(shape)} in one batch"
            )
        return np.stack(contents)

    def nbytes(self, content: Any) -> int:
        """See Content."""
        return int(content.nbytes)
