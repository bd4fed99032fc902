"""What ``layertap extract`` runs a model on: image files, recordings, texts, or rows of arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from layertap.audio import Audio
from layertap.errors import InvalidInputError
from layertap.texts import Texts, Truncation

if TYPE_CHECKING:
    import numpy as np

    from layertap.inputs import InputLike

__all__ = ["ArrayItems", "AudioItems", "ImageItems", "Items", "TextItems", "parse_array_files"]


class Items(ABC):
    """Items in order, of which a batch at a time is read.

    Attributes:
        noun: What they are called in the progress bar.
    """

    noun = "items"

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of items."""

    @abstractmethod
    def batch(self, begin: int, size: int) -> InputLike:
        """Return at most ``size`` items from item ``begin`` on, as a client takes them.

        Raises:
            InvalidInputError: A file can't be read.
        """

    @contextmanager
    def naming(self, begin: int) -> Iterator[None]:
        """Make errors about one item of the batch at ``begin`` name its file, if it has one."""
        del begin
        yield


class ImageItems(Items):
    """Image files, one for each item.

    Args:
        files: Their paths.

    Raises:
        InvalidInputError: There is no such file.
    """

    noun = "images"

    def __init__(self, files: Sequence[str]) -> None:
        for file in files:
            if not Path(file).is_file():
                raise InvalidInputError(f"image {file}: no such file")
        self._files = files

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._files)

    def batch(self, begin: int, size: int) -> InputLike:
        """See Items."""
        return [_read(file) for file in self._files[begin : begin + size]]

    @contextmanager
    def naming(self, begin: int) -> Iterator[None]:
        """See Items."""
        files = self._files[begin:]
        try:
            yield
        except InvalidInputError as error:
            if error.image is None or error.image >= len(files):
                raise
            raise InvalidInputError(f"image {files[error.image]}: {error.detail}") from error


class TextItems(Items):
    """Texts, one for each item.

    Args:
        texts: The texts.
        truncation: Where a text with too many tokens is cut.
    """

    noun = "texts"

    def __init__(self, texts: Sequence[str], truncation: Truncation) -> None:
        self._texts = texts
        self._truncation = truncation

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._texts)

    def batch(self, begin: int, size: int) -> InputLike:
        """See Items."""
        return Texts(self._texts[begin : begin + size], self._truncation)


class AudioItems(Items):
    """WAV or FLAC files, one for each item.

    Args:
        files: Their paths.

    Raises:
        InvalidInputError: There is no such file.
    """

    noun = "recordings"

    def __init__(self, files: Sequence[str]) -> None:
        for file in files:
            if not Path(file).is_file():
                raise InvalidInputError(f"audio {file}: no such file")
        self._files = files

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._files)

    def batch(self, begin: int, size: int) -> InputLike:
        """See Items."""
        return Audio(self._files[begin : begin + size])


class ArrayItems(Items):
    """Rows of arrays in .npy files, one array for each input of the model.

    The files are mapped into memory, so that only the rows of one batch are read at a time.

    Args:
        files: The path of each input's array, by the input's name; the name may be empty for the
            only input that the model needs.

    Raises:
        InvalidInputError: A file can't be read, or the arrays have different numbers of rows.
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        self._arrays = {name: _mapped(file) for name, file in files.items()}
        rows = {name: len(array) for name, array in self._arrays.items()}
        if len(set(rows.values())) > 1:
            each = ", ".join(f"{count} of {name!r}" for name, count in rows.items())
            raise InvalidInputError(f"inputs: got rows of {each}, expected one number for all")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self._arrays.values())))

    def batch(self, begin: int, size: int) -> InputLike:
        """See Items."""
        rows = {name: array[begin : begin + size] for name, array in self._arrays.items()}
        return rows[""] if list(rows) == [""] else rows


def parse_array_files(texts: Sequence[str]) -> dict[str, str]:
    """Return the paths of arrays by input, from ``NAME=FILE.npy`` or, for one input, ``FILE.npy``.

    Raises:
        InvalidInputError: A name is given twice, or is missing although there are several inputs.
    """
    files: dict[str, str] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        name, file = (name, file) if equals else ("", text)
        if name in files:
            raise InvalidInputError(f"--input: got {name!r} twice, expected each input once")
        files[name] = file
    if len(files) > 1 and "" in files:
        raise InvalidInputError(
            f"--input: got {files['']!r} without a name, expected NAME=FILE.npy for each of several"
        )
    return files


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise InvalidInputError(f"image {file}: {error.strerror}") from error


def _mapped(file: str) -> np.ndarray:
    import numpy as np

    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise InvalidInputError(f"input {file}: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:  # What numpy raises for a file that is no .npy file.
        raise InvalidInputError(
            f"input {file}: got no .npy file of numbers, expected one ({error})"
        ) from error
    if not isinstance(array, np.ndarray) or not array.ndim:
        raise InvalidInputError(f"input {file}: expected an .npy file of an array with rows")
    return array
