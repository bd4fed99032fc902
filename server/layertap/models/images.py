"""From encoded bytes to RGB pixels, with nothing decoded before its header is judged."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from layertap.errors import InvalidInputError

__all__ = ["ImageLimits", "decode_image"]

_EXPECTED = "a JPEG, PNG or WebP image"


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What decoding one image may cost.

    Attributes:
        max_pixels: Most pixels (width times height) that an image's header may announce.
    """

    max_pixels: int = 64 * 2**20


DEFAULT_LIMITS = ImageLimits()


def decode_image(
    data: bytes | memoryview, index: int, limits: ImageLimits = DEFAULT_LIMITS
) -> Image.Image:
    """Decode one JPEG, PNG or WebP image to RGB, as torchvision's default loader does.

    Whatever the mode (palette, alpha, grayscale, 16 bit, CMYK), Pillow converts it to RGB; of an
    animation the first frame is taken, and an EXIF orientation is not applied. May be called from
    any thread.

    Args:
        data: The encoded file.
        index: The image's place in the request, for messages.
        limits: What it may cost.

    Raises:
        InvalidInputError: the bytes are no such image, are damaged or cut short, or announce more
            pixels than allowed.
    """
    if not data:
        raise InvalidInputError(f"images[{index}]: got no bytes, expected {_EXPECTED}")
    open_file = _opener(bytes(data[:12]))
    if open_file is None:
        raise InvalidInputError(
            f"images[{index}]: got {len(data)} bytes of something else, expected {_EXPECTED}"
        )
    if open_file is WebPImageFile:
        # Its decoder allocates the whole canvas before it tells the size.
        _check_size(_webp_size(bytes(data[:30])), index, limits)
    try:
        with open_file(io.BytesIO(data)) as image:
            _check_size(image.size, index, limits)
            # Its values are dropped on conversion anyway, and Pillow warns about some of them.
            image.info.pop("transparency", None)
            return image.convert("RGB")
    except (InvalidInputError, MemoryError):
        raise
    # Pillow raises what its parsers trip over: OSError, SyntaxError, ValueError, struct.error, ...
    # The text of these stays in the server: it is about Pillow, not about the request.
    except Exception as error:
        raise InvalidInputError(
            f"images[{index}]: got {len(data)} bytes that are damaged or cut short, expected "
            f"{_EXPECTED}, complete"
        ) from error


def _opener(head: bytes) -> Callable[[io.BytesIO], ImageFile] | None:
    """Return the format's own reader, told by the first bytes.

    ``PIL.Image.open`` isn't used: it takes dozens of formats, and its check of the size warns
    through the process's warning filters, which no thread may change safely.
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
            f"images[{index}]: got {width} x {height} pixels, expected at most "
            f"{limits.max_pixels} pixels in all"
        )


def _webp_size(head: bytes) -> tuple[int, int]:
    """Return width and height from a WebP file's first 30 bytes; (0, 0) if they aren't there.

    The three layouts are those of RFC 9649, sections 2.5 to 2.7.
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
