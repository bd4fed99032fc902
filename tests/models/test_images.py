from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import Grayscale

from layertap.errors import InvalidInputError
from layertap.models import ImageLimits, decode_image
from layertap.models.images import Reading
from layertap.settings import Color

Encode = Callable[..., bytes]

SMALL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8))


def loaded_by_torchvision(data: bytes, folder: Path) -> np.ndarray:
    """Return the pixels that torchvision's default image loader reads from such a file."""
    path = folder / "image"
    path.write_bytes(data)
    with warnings.catch_warnings():
        # Pillow warns about palettes with transparency.
        warnings.simplefilter("ignore", UserWarning)
        return np.asarray(pil_loader(str(path)))


def variants(image: Image.Image, encode: Encode) -> dict[str, bytes]:
    """The image in each format and mode for which Pillow has its own code."""
    palette = image.quantize(16)
    return {
        "jpeg": encode(image, "JPEG"),
        "jpeg progressive": encode(image, "JPEG", progressive=True),
        "jpeg gray": encode(image.convert("L"), "JPEG"),
        "jpeg cmyk": encode(image.convert("CMYK"), "JPEG"),
        "jpeg multi-picture": encode(image, "MPO", save_all=True, append_images=[image]),
        "png": encode(image, "PNG"),
        "png alpha": encode(image.convert("RGBA"), "PNG"),
        "png gray": encode(image.convert("L"), "PNG"),
        "png gray alpha": encode(image.convert("LA"), "PNG"),
        "png one bit": encode(image.convert("1"), "PNG"),
        "png palette": encode(palette, "PNG"),
        "png palette transparent": encode(palette, "PNG", transparency=bytes(range(16))),
        "png rgb transparent": encode(image, "PNG", transparency=(1, 2, 3)),
        "webp": encode(image, "WEBP"),
        "webp lossless": encode(image, "WEBP", lossless=True),
        "webp alpha": encode(image.convert("RGBA"), "WEBP"),
        "webp animated": encode(image, "WEBP", save_all=True, append_images=[image.rotate(180)]),
    }


def test_every_mode_equals_torchvisions_loader(
    noise: Image.Image, encoded: Encode, tmp_path: Path
) -> None:
    """Each format and mode gives the RGB pixels of torchvision's default loader."""
    for name, data in variants(noise, encoded).items():
        image = decode_image(data, 0)
        assert image.mode == "RGB", name
        assert np.array_equal(np.asarray(image), loaded_by_torchvision(data, tmp_path)), name


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(
    kind: str, orientation: int, noise: Image.Image, encoded: Encode
) -> None:
    """An image of each orientation is turned as by Pillow; on request it is left as stored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    stored = Image.open(io.BytesIO(data))
    upright = ImageOps.exif_transpose(stored).convert("RGB")

    assert decode_image(data, 0).tobytes() == upright.tobytes()
    assert decode_image(data, 0).size == upright.size
    as_stored = decode_image(data, 0, reading=Reading(exif_orientation=False))
    assert as_stored.tobytes() == stored.convert("RGB").tobytes()
    assert as_stored.size == (40, 30)


def test_an_orientation_in_xmp_is_applied(noise: Image.Image, encoded: Encode) -> None:
    """Some cameras write the orientation as XMP only; Pillow and viewers apply it."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(noise, "JPEG", xmp=xmp)

    assert decode_image(data, 0).size == (30, 40)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_leaves_the_picture_as_stored(
    kind: str, exif: bytes, noise: Image.Image, encoded: Encode
) -> None:
    """Unreadable Exif data changes no pixel, as in image viewers."""
    image = decode_image(encoded(noise, kind, exif=exif), 0)

    assert image.size == (40, 30)


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_orientations_out_of_range_are_ignored(
    orientation: int, noise: Image.Image, encoded: Encode
) -> None:
    """Only the values 2 to 8 turn an image."""
    exif = Image.Exif()
    exif[0x0112] = orientation

    assert decode_image(encoded(noise, "PNG", exif=exif), 0).tobytes() == noise.tobytes()


def deep_png(encode: Encode, pixels: np.ndarray) -> bytes:
    """Return a grayscale PNG with 16 bits per pixel."""
    return encode(Image.fromarray(pixels.astype(np.uint16)), "PNG")


def test_16_bit_grayscale_keeps_its_brightness(encoded: Encode) -> None:
    """The high byte is used; Pillow's own conversion would clip values above 255 to white."""
    pixels = np.random.default_rng(0).integers(0, 2**16, (30, 40))
    data = deep_png(encoded, pixels)

    for color, mode in ((Color.RGB, "RGB"), (Color.GRAY, "L")):
        image = decode_image(data, 0, reading=Reading(color))
        assert image.mode == mode
        got = np.asarray(image)
        assert np.array_equal(got if mode == "L" else got[..., 1], pixels >> 8)


def test_16_bits_are_kept_on_request(encoded: Encode) -> None:
    """If the caller can use them, all 16 bits are returned."""
    pixels = np.random.default_rng(0).integers(0, 2**16, (30, 40))

    image = decode_image(deep_png(encoded, pixels), 0, reading=Reading(keep_16_bit=True))

    assert image.mode == "I;16"
    assert np.array_equal(np.asarray(image), pixels)


def test_gray_is_the_luma_of_torchvisions_loader(
    noise: Image.Image, encoded: Encode, tmp_path: Path
) -> None:
    """Each format and mode gives the gray that torchvision's Grayscale makes of its RGB."""
    for name, data in variants(noise, encoded).items():
        image = decode_image(data, 0, reading=Reading(Color.GRAY))
        expected = Grayscale()(Image.fromarray(loaded_by_torchvision(data, tmp_path)))
        assert image.mode == "L", name
        assert image.tobytes() == expected.tobytes(), name


def test_a_real_photograph_equals_torchvisions_loader(photo_bytes: bytes, tmp_path: Path) -> None:
    """A photo's file, given as bytes or as a view, is decoded as by torchvision."""
    expected = loaded_by_torchvision(photo_bytes, tmp_path)

    assert np.array_equal(np.asarray(decode_image(photo_bytes, 0)), expected)
    assert np.array_equal(np.asarray(decode_image(memoryview(photo_bytes), 0)), expected)


@pytest.mark.parametrize("data", [b"", memoryview(b"")])
def test_empty_bytes_are_refused(data: bytes) -> None:
    """Empty bytes are refused with the image's index."""
    with pytest.raises(InvalidInputError, match=r"^images\[3\]: got no bytes, expected a JPEG"):
        decode_image(data, 3)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(kind: str, noise: Image.Image, encoded: Encode) -> None:
    """Formats that Pillow could read but that aren't documented are refused."""
    with pytest.raises(InvalidInputError, match=r"images\[1\]: got \d+ bytes of something else"):
        decode_image(encoded(noise, kind), 1)


@pytest.mark.parametrize("data", [b"hello", b"\xff\xd8", b"RIFF1234WAVE", b"<svg/>", b"\x89PNG"])
def test_texts_and_stubs_are_refused(data: bytes) -> None:
    """Text, other RIFF files and the beginning of a signature are not images."""
    with pytest.raises(InvalidInputError, match="expected a JPEG, PNG or WebP image"):
        decode_image(data, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_files_are_refused(kind: str, noise: Image.Image, encoded: Encode) -> None:
    """A file cut anywhere in its first nine tenths is refused, never partly decoded."""
    data = encoded(noise, kind)
    for length in range(1, len(data) * 9 // 10, 7):
        with pytest.raises(InvalidInputError, match=r"images\[2\]"):
            decode_image(data[:length], 2)


def test_messages_leak_nothing_internal(noise: Image.Image, encoded: Encode) -> None:
    """The message has neither Pillow's text nor a path; the cause stays attached."""
    with pytest.raises(InvalidInputError) as caught:
        decode_image(encoded(noise, "PNG")[:60], 5)

    assert str(caught.value) == (
        "images[5]: got 60 bytes that are damaged or cut short, "
        "expected a JPEG, PNG or WebP image, complete"
    )
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "lossless", "alpha", "animated"])
def test_the_pixel_limit_is_inclusive(kind: str, noise: Image.Image, encoded: Encode) -> None:
    """An image of exactly the limit is accepted, one with a pixel more isn't, in each layout."""
    data = {
        "JPEG": lambda: encoded(noise, "JPEG"),
        "PNG": lambda: encoded(noise, "PNG"),
        "WEBP": lambda: encoded(noise, "WEBP"),
        "lossless": lambda: encoded(noise, "WEBP", lossless=True),
        "alpha": lambda: encoded(noise.convert("RGBA"), "WEBP"),
        "animated": lambda: encoded(noise, "WEBP", save_all=True, append_images=[noise.rotate(9)]),
    }[kind]()

    assert decode_image(data, 0, ImageLimits(max_pixels=1200)).size == (40, 30)
    with pytest.raises(
        InvalidInputError, match=r"images\[0\]: got 40 x 30 pixels, expected at most 1199 pixels"
    ):
        decode_image(data, 0, ImageLimits(max_pixels=1199))


def png_announcing(width: int, height: int) -> bytes:
    """Return a PNG's header with this size, and no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + struct.pack(">I", 9)
        + b"IDAT"
    )


def webp_announcing(width: int, height: int, image: bytes) -> bytes:
    """Return a small WebP image on a canvas of this size."""
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + image[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_bombs_are_refused_by_their_header(noise: Image.Image, encoded: Encode) -> None:
    """A few bytes that announce gigapixels are refused, without Pillow's warnings."""
    for data in (
        png_announcing(60_000, 60_000),
        png_announcing(10_000, 10_000),
        webp_announcing(16_384, 16_384, encoded(noise, "WEBP")),
    ):
        with pytest.raises(InvalidInputError, match="expected at most 67108864 pixels"):
            decode_image(data, 0)


def test_pillows_global_limit_plays_no_part(
    noise: Image.Image, encoded: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow's own limit neither warns nor refuses: only the server's limit applies."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)

    assert decode_image(encoded(noise, "JPEG"), 0).size == (40, 30)
    assert decode_image(encoded(noise, "PNG"), 0).size == (40, 30)


def test_threads_do_not_disturb_each_other(noise: Image.Image, encoded: Encode) -> None:
    """Eight threads that decode all variants get the same results as one thread."""
    files = list(variants(noise, encoded).values())
    expected = [decode_image(data, 0).tobytes() for data in files]

    with ThreadPoolExecutor(8) as pool:
        for decoded in pool.map(lambda _: [decode_image(d, 0).tobytes() for d in files], range(16)):
            assert decoded == expected


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(
        [
            *("jpeg", "png", "png palette transparent", "webp", "webp lossless"),
            *("deep", "turned", "turned png"),
        ]
    ),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6),
    length=st.integers(0, 10_000),
    color=st.sampled_from(Color),
    keep=st.booleans(),
)
def test_hostile_bytes_decode_or_are_invalid(
    *,
    kind: str,
    edits: list[tuple[int, int]],
    length: int,
    color: Color,
    keep: bool,
    encoded: Encode,
) -> None:
    """For any bytes, the result is an image as requested or an InvalidInputError."""
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.arange(99, dtype=np.uint16).reshape(9, 11) * 600
    files = variants(SMALL, encoded) | {
        "deep": deep_png(encoded, deep),
        "turned": encoded(SMALL, "JPEG", exif=exif),
        "turned png": encoded(SMALL, "PNG", exif=exif),
    }
    data = bytearray(files[kind])
    for position, value in edits:
        data[position % len(data)] = value
    with warnings.catch_warnings():
        # Pillow warns about some damage; the server's log may have it.
        warnings.simplefilter("ignore")
        try:
            reading = Reading(color, keep_16_bit=keep)
            image = decode_image(bytes(data[: length or None]), 0, reading=reading)
        except InvalidInputError:
            return
    assert image.mode in ("RGB" if color is Color.RGB else "L", *(["I;16"] if keep else []))
