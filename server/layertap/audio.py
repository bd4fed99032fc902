"""Recordings as the input of a model. This doesn't import PyTorch."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from layertap.errors import InvalidInputError

if TYPE_CHECKING:
    Recording = bytes | str | os.PathLike[str] | np.ndarray | Any

__all__ = ["Audio"]

_MAX_RATE = 2**31 - 1
_FLOAT = 3
"""The number of WAV's format for floating-point samples."""


@dataclass(frozen=True, slots=True)
class Audio:
    """Recordings for a model, one for each item; the model's own feature extractor converts them.

    Attributes:
        files: One recording, or several: the path or the bytes of a WAV or FLAC file, or an array
            ``[samples]`` of floating-point numbers, usually from -1 to 1, or of int16. Afterwards
            the bytes of a file for each; an array is sent as a WAV file of float32.
        sampling_rate: The samples per second of arrays; files say it themselves.

    Raises:
        InvalidInputError: A file can't be read, an array has another shape or dtype, or its
            sampling rate is missing.
    """

    files: Recording | Sequence[Recording]
    sampling_rate: int | None = None

    def __post_init__(self) -> None:
        given = self.files
        each = list(given) if isinstance(given, list | tuple) else [given]
        rate = self.sampling_rate
        if rate is not None and (not isinstance(rate, int) or not 0 < rate <= _MAX_RATE):
            raise InvalidInputError(f"sampling_rate: got {rate!r}, expected samples per second")
        files = tuple(_file(recording, index, rate) for index, recording in enumerate(each))
        object.__setattr__(self, "files", files)

    @property
    def encoded(self) -> tuple[bytes, ...]:
        """The bytes of each file."""
        return cast("tuple[bytes, ...]", self.files)


def _file(recording: Any, index: int, rate: int | None) -> bytes:
    if isinstance(recording, bytes):
        return recording
    if isinstance(recording, str | os.PathLike):
        try:
            return Path(recording).read_bytes()
        except OSError as error:
            raise InvalidInputError(
                f"audio[{index}]: can't read {os.fspath(recording)!r}: {error.strerror}"
            ) from error
    if hasattr(recording, "detach") and hasattr(recording, "cpu"):  # A torch tensor.
        recording = recording.detach().cpu().numpy()
    if not isinstance(recording, np.ndarray):
        raise InvalidInputError(
            f"audio[{index}]: got a {type(recording).__name__}, expected a path, the bytes of a "
            f"file, or an array"
        )
    return _wav(_samples(recording, index), _rate(rate, index))


def _rate(rate: int | None, index: int) -> int:
    if rate is None:
        raise InvalidInputError(
            f"audio[{index}]: got an array without a sampling rate, expected sampling_rate=..."
        )
    return rate


def _samples(array: np.ndarray, index: int) -> np.ndarray:
    """Return an array's samples as float32; int16 is divided by 32768, as audio libraries do."""
    if array.ndim != 1:
        raise InvalidInputError(
            f"audio[{index}]: got shape {list(array.shape)}, expected [samples]; of several "
            f"channels, send one or their mean"
        )
    if array.dtype == np.int16:
        return array.astype(np.float32) / np.float32(2**15)
    if array.dtype.kind != "f":
        raise InvalidInputError(
            f"audio[{index}]: got dtype {array.dtype}, expected floating-point numbers or int16"
        )
    return array.astype(np.float32)


def _wav(samples: np.ndarray, rate: int) -> bytes:
    """Return a WAV file of one channel of float32."""
    data = samples.astype("<f4").tobytes()
    form = struct.pack("<HHIIHHH", _FLOAT, 1, rate, min(4 * rate, 2**32 - 1), 4, 32, 0)
    chunks = b"".join(
        name + struct.pack("<I", len(body)) + body
        for name, body in (
            (b"fmt ", form),
            (b"fact", struct.pack("<I", len(samples))),
            (b"data", data),
        )
    )
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks
