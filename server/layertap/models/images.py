"""Decodes image files to pixels; refuses files whose header announces too many pixels."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from layertap.errors import InvalidInputError
from layertap.models.exact_images import Pixels, jpeg_pixels, pixels_of
from layertap.settings.image_settings import Color

__all__ = ["ImageLimits", "Reading", "decode_image", "decode_pixels"]

_EXPECTED = "a JPEG, PNG or WebP image"

# How to turn the stored pixels upright, by EXIF orientation (EXIF 2.32, section 4.6.4).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class Reading:
    """How an image file is decoded.

    Attributes:
        color: The channels of the decoded image. Colour becomes gray by Pillow's luma formula
            (ITU-R 601-2).
        exif_orientation: Whether the picture is turned as its EXIF orientation says.
        keep_16_bit: Whether a grayscale PNG with 16 bits per pixel keeps them. Then the decoded
            image has the mode ``I;16``, whatever ``color`` says. Otherwise the high byte is used.
    """

    color: Color = Color.RGB
    exif_orientation: bool = True
    keep_16_bit: bool = False


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits for decoding one image.

    Attributes:
        max_pixels: Maximum number of pixels (width times height) in an image's header.
    """

    max_pixels: int = 64 * 2**20


DEFAULT_LIMITS = ImageLimits()
DEFAULT_READING = Reading()


def decode_image(
    data: bytes | memoryview,
    index: int,
    limits: ImageLimits = DEFAULT_LIMITS,
    reading: Reading = DEFAULT_READING,
) -> Image.Image:
    """Decode one JPEG, PNG or WebP image with Pillow. May be called from any thread.

    The pixels are those of torchvision's default loader, with two differences: the EXIF orientation
    is applied (unless ``reading`` says otherwise), and 16-bit grayscale keeps its brightness
    instead of being clipped at 255. As in that loader, alpha is dropped (transparent pixels show
    the colour stored under them), CMYK is converted by Pillow's formula without colour profiles,
    and only the first frame of an animation is used.

    Args:
        data: The encoded file.
        index: The image's place in the request, for messages.
        limits: The limits for decoding.
        reading: The channels to decode to, and whether to apply the EXIF orientation.

    Returns:
        An image of mode ``RGB``, ``L`` or ``I;16``.

    Raises:
        InvalidInputError: The bytes are not such an image, are damaged or incomplete, or announce
            more pixels than allowed.
    """
    with _opened(data, index, limits) as image:
        return _loaded(image, reading)


def decode_pixels(
    data: bytes,
    index: int,
    limits: ImageLimits = DEFAULT_LIMITS,
    reading: Reading = DEFAULT_READING,
) -> Pixels | Image.Image:
    """Decode one JPEG, PNG or WebP image to its bytes; see ``decode_image``.

    JPEG files in colour or gray, which are most, are decoded by libjpeg-turbo directly. Use this
    only if ``exact_images.is_exact()``.

    Returns:
        The pixels of an image of 8 bits per channel, or an image of mode ``I;16``.
    """
    with _opened(data, index, limits) as image:
        if _is_plain_jpeg(image, reading):
            pixels = jpeg_pixels(data, image.size, gray=image.mode == "L")
            if pixels is not None:
                return pixels
        loaded = _loaded(image, reading)
        return loaded if loaded.mode == "I;16" else pixels_of(loaded)


@contextmanager
def _opened(data: bytes | memoryview, index: int, limits: ImageLimits) -> Iterator[ImageFile]:
    """Read the header of an image file, check it, and turn the errors of the block into ours."""
    if not data:
        raise InvalidInputError(f"got no bytes, expected {_EXPECTED}", image=index)
    open_file = _opener(bytes(data[:12]))
    if open_file is None:
        raise InvalidInputError(
            f"got {len(data)} bytes of something else, expected {_EXPECTED}", image=index
        )
    if open_file is WebPImageFile:
        # The WebP decoder allocates the whole canvas before it reports the size.
        _check_size(_webp_size(bytes(data[:30])), index, limits)
    try:
        with open_file(io.BytesIO(data)) as image:
            _check_size(image.size, index, limits)
            yield image
    except (InvalidInputError, MemoryError):
        raise
    # Pillow's parsers may raise anything: OSError, SyntaxError, ValueError, struct.error, ...
    # Their message is about Pillow, not about the request, so the client does not get it.
    except Exception as error:
        raise InvalidInputError(
            f"got {len(data)} bytes that are damaged or cut short, expected {_EXPECTED}, complete",
            image=index,
        ) from error


def _loaded(image: ImageFile, reading: Reading) -> Image.Image:
    image.load()
    # PNG may have its EXIF after the pixels, so it is read once they are loaded.
    turn = _UPRIGHT.get(_orientation(image)) if reading.exif_orientation else None
    # The conversion drops transparency anyway, and Pillow warns about some of its values.
    image.info.pop("transparency", None)
    converted = _converted(image, reading)
    return converted if turn is None else converted.transpose(turn)


def _is_plain_jpeg(image: ImageFile, reading: Reading) -> bool:
    """Return whether an image is a JPEG file whose pixels need no conversion and no turn."""
    if not isinstance(image, JpegImageFile):
        return False
    if image.mode != "L" and (image.mode != "RGB" or reading.color is not Color.RGB):
        return False
    return not reading.exif_orientation or _orientation(image) not in _UPRIGHT


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) if there is none or it can't be read.

    Image viewers ignore damaged EXIF data as well: the pixels are not affected.
    """
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - Pillow's parser may raise anything
        return 1
    return value if isinstance(value, int) else 1


def _converted(image: Image.Image, reading: Reading) -> Image.Image:
    if image.mode.startswith("I"):
        # A 16-bit grayscale PNG: Pillow's own conversion would clip values above 255 to white.
        if reading.keep_16_bit and image.mode == "I;16":
            return image.copy()
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    rgb = image.convert("RGB")
    return rgb if reading.color is Color.RGB else rgb.convert("L")


def _opener(head: bytes) -> Callable[[io.BytesIO], ImageFile] | None:
    """Return the reader for the format that the first bytes show; None if they show none.

    ``PIL.Image.open`` isn't used: it accepts dozens of formats, and its size check uses the
    process's warning filters, which no thread can change safely.
    """
    if head.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return WebPImageFile
    return None


def _check_size(size: tuple[int, int], index: int, limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise InvalidInputError(
            f"got {width} x {height} pixels, expected at most {limits.max_pixels} pixels in all",
            image=index,
        )


def _webp_size(head: bytes) -> tuple[int, int]:
    """Return width and height from a WebP file's first 30 bytes; (0, 0) if they are missing.

    RFC 9649, sections 2.5 to 2.7, defines the three layouts.
    """
    if head[12:16] == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if head[12:16] == b"VP8 ":
        return (
            int.from_bytes(head[26:28], "little") & 0x3FFF,
            int.from_bytes(head[28:30], "little") & 0x3FFF,
        )
    return 0, 0
