"""A faster way from an image file to a model's input, with the same values bit for bit.

Note [Proven first]
    The reference is Pillow's decoding and torchvision's transforms. This module replaces them by
    libjpeg-turbo (through simplejpeg), by the extension's resize, which repeats Pillow's
    arithmetic (csrc/resample.h), and by tables that the reference itself calculates: each of the
    256 bytes is scaled and normalised once. Whether decoders and resizes agree depends on the
    versions and the CPU. So before it is used in a process, ``is_exact`` compares it with the
    reference, on images of every kind that it would handle; one byte of difference, and the process
    uses the reference.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from layertap.settings.image_settings import Color
from layertap.wire import codec

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

__all__ = [
    "FILTERS",
    "Kept",
    "Pixels",
    "convert",
    "image_of",
    "is_exact",
    "jpeg_pixels",
    "pixels_of",
]

_log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
"""``[H, W, 1]`` for gray, or ``[H, W, 4]`` for RGB and an unused byte; contiguous."""

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
"""The filters that the extension knows, by their names in torchvision."""

_PILLOW_MAJOR = int(PIL.__version__.split(".")[0])


@dataclass(frozen=True, slots=True)
class Kept:
    """What remains of an image.

    Attributes:
        size: Height and width of the resized image.
        window: Top, left, height and width of the crop in it.
    """

    size: tuple[int, int]
    window: tuple[int, int, int, int]


def convert(
    pixels: Pixels,
    kept: Kept,
    interpolation: str,
    tables: NDArray[np.float32],
    target: NDArray[np.float32],
) -> None:
    """Resize an image, keep a window of it, and look its bytes up. May run in any thread.

    Args:
        pixels: The decoded image.
        kept: The size to resize to, and the window.
        interpolation: The filter, one of ``FILTERS``.
        tables: ``[channels, 256]``, what each byte becomes.
        target: ``[channels, height, width]`` of the window, contiguous; gets the result.
    """
    codec.image_values(
        pixels,
        size=kept.size,
        window=kept.window,
        interpolation=interpolation,
        vertical_first=_is_vertical_first(pixels.shape[0], pixels.shape[1], *kept.size),
        tables=tables,
        target=target,
    )


def jpeg_pixels(data: bytes, size: tuple[int, int], *, gray: bool) -> Pixels | None:
    """Return a JPEG file's pixels as stored, without its EXIF orientation. May run in any thread.

    Args:
        data: The file.
        size: Its width and height, as Pillow reads them.
        gray: Whether it has one channel.

    Returns:
        None if libjpeg-turbo finds anything odd about the file; then Pillow decides about it.
    """
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        # The size was checked against the limits. A file with two headers may show another one.
        if (width, height) != size:
            return None
        pixels: Pixels = simplejpeg.decode_jpeg(data, "GRAY" if gray else "RGBX")
    except ValueError:
        return None
    return pixels


def pixels_of(image: Image.Image) -> Pixels:
    """Return a copy of an image's pixels, of mode ``L`` or ``RGB``."""
    mode, channels = ("L", 1) if image.mode == "L" else ("RGBX", 4)
    data = image.tobytes("raw", mode)
    return np.frombuffer(data, np.uint8).reshape(image.height, image.width, channels)


def image_of(pixels: Pixels, color: Color) -> Image.Image:
    """Return the image that has these pixels, with the channels of ``color``."""
    height, width, channels = pixels.shape
    raw, mode = ("L", "L") if channels == 1 else ("RGBX", "RGB")
    image = Image.frombuffer(mode, (width, height), pixels, "raw", raw, 0, 1)
    return image.convert("RGB" if color is Color.RGB else "L")


@lru_cache(maxsize=1)
def is_exact() -> bool:
    """Return whether this way gives the reference's values here; see Note [Proven first]."""
    if not codec.ACCELERATED:
        return False  # Pillow is faster than the plain Python code.
    if simplejpeg is None:
        _log.warning("images are decoded and resized more slowly: simplejpeg is not installed")
        return False
    for what, agrees in (("decoder", _decoders_agree()), ("resize", _resizes_agree())):
        if not agrees:
            _log.warning(
                "images are decoded and resized more slowly: the %s of Pillow %s gives other "
                "pixels than layertap's",
                what, PIL.__version__,
            )  # fmt: skip
            return False
    return True


def _is_vertical_first(height: int, width: int, to_height: int, to_width: int) -> bool:
    """Return whether Pillow resizes the columns first.

    Versions before 13 never do. Since 13 it depends on how much each side shrinks
    (python-pillow/Pillow#9549); found by comparison with Pillow 13.0, and checked by ``is_exact``.
    """
    if _PILLOW_MAJOR < 13:
        return False
    return height > to_height and height - to_height > 2 * (width - to_width)


def _decoders_agree() -> bool:
    return all(
        _is_same(jpeg_pixels(data, image.size, gray=image.mode == "L"), image)
        for data, image in _jpegs()
    )


def _jpegs() -> Iterator[tuple[bytes, Image.Image]]:
    """Yield JPEG files of every common kind, and their pixels by Pillow."""
    noise = np.random.default_rng(0).integers(0, 256, (53, 75, 3), np.uint8)
    # Smooth and noisy parts: chroma is upsampled, and coefficients are large and small.
    noise[:, :40] = np.linspace(0, 255, 53 * 40 * 3).reshape(53, 40, 3).astype(np.uint8)
    kinds: Sequence[tuple[str, dict[str, Any]]] = (
        ("RGB", {"subsampling": "4:4:4", "quality": 95}),
        ("RGB", {"subsampling": "4:2:2", "quality": 60}),
        ("RGB", {"subsampling": "4:2:0", "quality": 75}),
        ("RGB", {"subsampling": "4:2:0", "quality": 30, "progressive": True}),
        ("L", {"quality": 75}),
    )
    for mode, options in kinds:
        file = io.BytesIO()
        Image.fromarray(noise).convert(mode).save(file, "JPEG", **options)
        with Image.open(file) as image:
            image.load()
        yield file.getvalue(), image


def _resizes_agree() -> bool:
    noise = np.random.default_rng(1).integers(0, 256, (60, 50, 3), np.uint8)
    colour = Image.fromarray(noise)
    # Smaller, larger, both, and on each side of where Pillow changes the order of its passes.
    sizes = ((30, 25), (90, 70), (20, 60), (80, 20), (40, 40), (39, 40), (60, 20), (20, 50))
    return all(
        _is_same(_resized(pixels_of(image), size, name), image.resize(size[::-1], filter_))
        for image in (colour, colour.convert("L"))
        for name, filter_ in FILTERS.items()
        for size in sizes
    )


def _resized(pixels: Pixels, size: tuple[int, int], interpolation: str) -> Pixels:
    channels = pixels.shape[2]
    tables = np.tile(np.arange(256, dtype=np.float32), (channels, 1))
    target = np.empty((channels, *size), np.float32)
    convert(pixels, Kept(size, (0, 0, *size)), interpolation, tables, target)
    return np.moveaxis(target, 0, -1).astype(np.uint8)


def _is_same(pixels: Pixels | None, image: Image.Image) -> bool:
    if pixels is None:
        return False
    expected = pixels_of(image)
    used = slice(None) if expected.shape[2] == 1 else slice(3)
    return pixels.shape == expected.shape and np.array_equal(pixels[..., used], expected[..., used])
