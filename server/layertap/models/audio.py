"""Decodes recordings, and converts them to a model's tensors by its own feature extractor.

Note [Sampling rates]
    A model hears only what it was trained with, at one sampling rate. A recording at another rate
    is refused: resampling needs a filter, each library has another one, and a wrong choice would
    silently change the features. The channels of a recording are averaged, as is usual.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layertap.errors import InvalidInputError

__all__ = ["AudioProcessor", "can_decode", "decode_audio"]

_SAMPLE_BYTES = 4

_LOUDEST = 2.0**40
"""Largest magnitude of a sample: the squares of an hour of these add up to a finite float32."""


def can_decode() -> bool:
    """Return whether the package that decodes recordings is installed."""
    return importlib.util.find_spec("soundfile") is not None


@dataclass(frozen=True, slots=True)
class AudioProcessor:
    """Converts waveforms to a model's tensors. Safe to share between threads.

    Attributes:
        run: Takes waveforms, each ``[samples] float32``; returns the tensors ``[B, ...]`` by the
            names of the inputs. It may use PyTorch.
        rate: The sampling rate that the model takes, in samples per second.
        most: The maximum number of samples; 0 for no limit.
        one_length: Whether all recordings of a request must have one length, because the model
            takes no mask of their padding.
        origin: Where it comes from, such as ``"the folder's Wav2Vec2FeatureExtractor"``.
    """

    run: Callable[[list[np.ndarray]], Mapping[str, np.ndarray]]
    rate: int
    most: int = 0
    one_length: bool = False
    origin: str = ""

    def describe(self) -> str:
        """Describe in words how a recording is converted."""
        most = f", at most {self.most / self.rate:g} seconds" if self.most else ""
        length = ", all recordings of a request of one length" if self.one_length else ""
        return (
            f"WAV or FLAC at {self.rate} samples per second{most}{length}, channels averaged, "
            f"converted by {self.origin}"
        )

    def check(self, waveforms: Sequence[np.ndarray]) -> None:
        """Check the lengths of a request's waveforms.

        Raises:
            InvalidInputError: One is too long, or they must have one length and don't.
        """
        for index, waveform in enumerate(waveforms):
            if self.most and len(waveform) > self.most:
                raise _wrong(
                    index,
                    f"got {len(waveform) / self.rate:g} seconds, expected at most "
                    f"{self.most / self.rate:g}; cut the recording",
                )
        lengths = sorted(map(len, waveforms))
        if self.one_length and lengths[0] != lengths[-1]:
            raise InvalidInputError(
                f"audio: got recordings of {lengths[0]} to {lengths[-1]} samples, expected one "
                f"length, as this model takes no mask of padding; send them one at a time"
            )


def decode_audio(
    data: bytes, index: int, rate: int, most: int, admit: Callable[[int], object]
) -> np.ndarray:
    """Decode a WAV or FLAC file; return its samples ``[samples] float32``, its channels averaged.

    It doesn't use PyTorch, so any thread may call it.

    Args:
        data: The file.
        index: The recording's place in the request, for messages.
        rate: The sampling rate that it must have, in samples per second.
        most: The maximum number of samples, those of all channels together.
        admit: Called before decoding, with the bytes that this takes; may raise OverloadedError.

    Raises:
        InvalidInputError: It is no such file, is empty, too long or damaged, has another sampling
            rate, or contains NaN, infinity or numbers that no recording has.
    """
    # Only these two: libsndfile's other formats are rare, and each is more code for hostile bytes.
    if not (data[:4] == b"fLaC" or (data[:4] == b"RIFF" and data[8:12] == b"WAVE")):
        raise _wrong(index, f"got {len(data)} bytes that are no WAV or FLAC file")
    if data[:4] == b"RIFF":
        _check_whole(data, index)
    # Optional: only models of audio need it.
    import soundfile  # noqa: PLC0415

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_header(file, index, rate, most)
            admit(2 * file.frames * file.channels * _SAMPLE_BYTES)
            samples = file.read(dtype="float32", always_2d=True)
            whole = len(samples) == file.frames
    # libsndfile's errors; soundfile raises the others for headers that contradict themselves.
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError, OSError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise _wrong(index, f"the file can't be decoded ({error})") from error
    if not whole:
        raise _wrong(index, "the file is damaged: it has fewer samples than its header says")
    if not np.isfinite(samples).all():
        raise _wrong(index, "got NaN or infinity among its samples")
    if (loudest := float(np.abs(samples).max())) > _LOUDEST:
        raise _wrong(
            index, f"got samples of up to {loudest:.3g}, expected at most {_LOUDEST:.3g}, usually 1"
        )
    mono: np.ndarray = samples[:, 0] if samples.shape[1] == 1 else samples.mean(1)
    return np.ascontiguousarray(mono)


def _check_whole(data: bytes, index: int) -> None:
    """Refuse a WAV file whose end is missing; libsndfile would return what there is."""
    size = int.from_bytes(data[4:8], "little")
    # Programs that write to a pipe don't know the size, and leave one of these.
    if size not in (0, 2**32 - 1) and size + 8 > len(data) + 1:
        raise _wrong(
            index, f"the file is damaged: got {len(data)} bytes, expected {size + 8}, as it says"
        )


def _check_header(file: Any, index: int, rate: int, most: int) -> None:
    if file.samplerate != rate:
        raise _wrong(
            index,
            f"got {file.samplerate} samples per second, expected {rate}, with which the model was "
            f"trained; resample the recording before you send it",
        )
    if file.frames < 1:
        raise _wrong(index, "got no samples, expected at least one")
    if file.frames * file.channels > most:
        raise _wrong(
            index,
            f"got {file.frames} samples of {file.channels} channels, expected at most {most} "
            f"in all recordings of a request",
        )


def _wrong(index: int, message: str) -> InvalidInputError:
    return InvalidInputError(f"audio[{index}]: {message}")
