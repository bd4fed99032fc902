"""Converts a caller's input to encoded images or to arrays."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from layertap.audio import Audio
from layertap.errors import InvalidInputError
from layertap.texts import Texts

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageLike = bytes | str | os.PathLike[str] | Image
    ArrayLike = np.ndarray | Any
    OneInput = (
        ArrayLike | ImageLike | Sequence[ImageLike] | Sequence[Sequence[ImageLike]] | Texts | Audio
    )
    InputLike = OneInput | Mapping[str, OneInput]

    from layertap.wire.tensors import Arrays

__all__ = ["EncodedInput", "encode_input"]

_ORIENTATION = 0x0112


class EncodedInput(NamedTuple):
    """A caller's input in the form in which it is sent.

    Attributes:
        arrays: Arrays with the names of their inputs.
        images: The files of images, one for each item, with the names of their inputs.
        texts: Texts, with the names of their inputs.
        audio: Recordings, with the names of their inputs.
    """

    arrays: Arrays
    images: Sequence[tuple[str, list[bytes]]]
    texts: Sequence[tuple[str, Texts]] = ()
    audio: Sequence[tuple[str, Audio]] = ()


def encode_input(given: Any) -> EncodedInput:
    """Convert inputs to arrays and encoded images.

    Args:
        given: An array or tensor ``[B, ...]`` for the model; an image, or a list of images;
            ``Texts``; ``Audio``; or a mapping of input names to these. A video is a list of frames,
            so a list of lists of images is a batch of videos. An image is a path, the bytes of a
            JPEG, PNG or WebP file, or a PIL image. A PIL image is sent as PNG, without loss and
            with its EXIF orientation; CMYK is sent as the RGB to which the server would convert it.

    Returns:
        The arrays, images, texts and recordings. What was given without a name has an empty one.

    Raises:
        InvalidInputError: If it is none of these, or if an image can't be read or sent.
    """
    if not isinstance(given, Mapping):
        return _encoded_inputs({"": given})
    if not given or not all(isinstance(name, str) for name in given):
        got = "an empty mapping" if not given else f"names {list(given)}"
        raise InvalidInputError(f"input: got {got}, expected names of inputs, which are strings")
    return _encoded_inputs(given)


def _encoded_inputs(given: Mapping[str, Any]) -> EncodedInput:
    arrays: list[tuple[str, np.ndarray]] = []
    images: list[tuple[str, list[bytes]]] = []
    texts: list[tuple[str, Texts]] = []
    audio: list[tuple[str, Audio]] = []
    for name, value in given.items():
        what = f"input {name!r}" if name else "input"
        if isinstance(value, Texts):
            texts.append((name, value))
        elif isinstance(value, Audio):
            audio.append((name, value))
        elif _is_image(value):
            images.append((name, [_image_bytes(value)]))
        elif isinstance(value, list | tuple):
            images.append((name, _image_list(value, what)))
        else:
            more = "" if name else " or a mapping of these"
            expected = f"an image, a list of images, Texts, Audio, an array{more}"
            arrays.append((name, _array(value, what, expected)))
    return EncodedInput(arrays, images, texts, audio)


def _image_list(given: Sequence[Any], what: str) -> list[bytes]:
    if given and all(isinstance(item, list | tuple) for item in given):
        return _frames(given, what)
    wrong = next((item for item in given if not _is_image(item)), None)
    if wrong is not None or not given:
        got = "an empty list" if not given else f"a list with a {type(wrong).__name__}"
        raise InvalidInputError(f"{what}: got {got}, expected images or one array")
    return [_image_bytes(item) for item in given]


def _frames(videos: Sequence[Sequence[Any]], what: str) -> list[bytes]:
    """Return the frames of videos one after the other, as they are sent."""
    counts = sorted({len(video) for video in videos})
    if len(counts) > 1:
        raise InvalidInputError(
            f"{what}: got videos of {counts[0]} to {counts[-1]} frames, expected one number of "
            f"frames for all"
        )
    return [frame for video in videos for frame in _image_list(video, what)]


def _array(given: Any, what: str, expected: str) -> np.ndarray:
    if isinstance(given, np.ndarray):
        return _little_endian(given)
    if hasattr(given, "detach") and hasattr(given, "cpu"):  # A torch tensor; torch isn't imported.
        return _from_torch(given)
    raise InvalidInputError(f"{what}: got {type(given).__name__}, expected {expected}")


def _is_image(value: Any) -> bool:
    return isinstance(value, bytes | str | os.PathLike) or hasattr(value, "tobitmap")


def _image_bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str | os.PathLike):
        try:
            return Path(value).read_bytes()
        except OSError as error:
            raise InvalidInputError(
                f"input: can't read image {os.fspath(value)!r}: {error.strerror}"
            ) from error
    return _encoded(value)


def _encoded(image: Image) -> bytes:
    if image.mode == "I":
        raise InvalidInputError(
            "input: can't send a PIL image of mode I, whose 32-bit numbers have no known range; "
            "convert it to 'I;16' (0 to 65535) or 'L' (0 to 255)"
        )
    buffer = io.BytesIO()
    try:
        options = _orientation(image)
        # PNG has no CMYK. The server would convert such a file to RGB in the same way.
        image = image.convert("RGB") if image.mode == "CMYK" else image
        image.save(buffer, "PNG", compress_level=1, **options)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's errors on reading and writing.
        raise InvalidInputError(
            f"input: can't send a PIL image of mode {image.mode}: {error}"
        ) from error
    return buffer.getvalue()


def _orientation(image: Image) -> dict[str, Any]:
    """Return the option of ``save`` that keeps the EXIF orientation, which PNG would lose."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - Pillow's parser may raise anything
        return {}
    if orientation == 1:
        return {}
    from PIL.Image import Exif

    kept = Exif()
    kept[_ORIENTATION] = orientation
    return {"exif": kept}


def _little_endian(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _from_torch(tensor: Any) -> np.ndarray:
    try:
        return _array_of(tensor.detach().cpu().resolve_conj().resolve_neg())
    # torch's errors for dtypes that numpy lacks, sparse tensors, and tensors without values.
    except (AttributeError, RuntimeError, TypeError) as error:
        raise InvalidInputError(f"input: can't send a {type(tensor).__name__}: {error}") from error


def _array_of(tensor: Any) -> np.ndarray:
    if str(tensor.dtype) != "torch.bfloat16":
        return tensor.numpy()  # type: ignore[no-any-return]
    import ml_dtypes
    import torch

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)  # type: ignore[no-any-return]
