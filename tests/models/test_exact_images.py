"""The fast way from a file to a model's input gives the reference's values, or is not used."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from batches import images_for
from layertap.errors import InvalidInputError
from layertap.models import Preprocess, Steps, decode_image, exact_images
from layertap.models.exact_images import is_exact
from layertap.models.images import Reading, decode_pixels
from layertap.models.steps import ResizeMode
from layertap.settings import Color

Encode = Callable[..., bytes]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def unproven() -> Iterator[None]:
    """The comparison with the reference is made again, in the test and after it."""
    is_exact.cache_clear()
    yield
    is_exact.cache_clear()


def picture(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colours with noise on them, as photographs have."""
    rng = np.random.default_rng(seed)
    waves = np.sin(np.linspace(0, 9, height))[:, None] * np.cos(np.linspace(0, 7, width))
    noise = rng.normal(0, 20, (height, width, 3))
    array = np.clip(waves[..., None] * 110 + 128 + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(array).convert(mode)


def test_the_fast_way_is_used_here() -> None:
    """With the pinned versions it agrees with the reference; if not, this project must know."""
    assert is_exact()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "box", "hamming", "lanczos"])
@pytest.mark.parametrize("size", [(300, 400), (400, 300), (97, 901), (901, 97), (64, 64), (40, 50)])
def test_values_equal_torchvisions_transforms(
    size: tuple[int, int], interpolation: str, encoded: Encode
) -> None:
    """Whatever the picture's size, the batch has torchvision's values, bit for bit."""
    preset = transforms.Compose(
        [
            transforms.Resize(64, InterpolationMode(interpolation)),
            transforms.CenterCrop(56),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    preprocess = Preprocess.of(preset)
    assert preprocess.is_fast
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(picture(*size), kind)
        expected = preset(Image.open(io.BytesIO(data)).convert("RGB"))
        assert torch.equal(images_for(preprocess, data)[0], expected)


@pytest.mark.parametrize(
    "steps",
    [
        Steps(resize=(50, 70), resize_mode=ResizeMode.EXACT, crop=(48, 60)),
        Steps(
            resize=(50, 70), resize_mode=ResizeMode.COVER, crop=(50, 70), interpolation="bicubic"
        ),
        Steps(resize=(60, 60), resize_mode=ResizeMode.CONTAIN, crop=(64, 64), fill=(9, 8, 7)),
        Steps(resize=(61,), crop=(44, 44), crop_down=True, mean=MEAN, std=STD),
        Steps(resize=(61,), crop=(44, 44), mean=(0.5,), std=(0.5,)),
        Steps(resize=(40,), crop=(64, 64)),
        Steps(crop=(31, 33)),
        Steps(crop=(500, 33)),
        Steps(resize=(45,)),
        Steps(),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_steps_of_every_kind_equal_the_reference(steps: Steps, mode: str, encoded: Encode) -> None:
    """Resizes, crops and padding of every kind: the values are those of the reference's functions.

    The reference is Pillow's image through ``shrink`` and ``finish``, which other tests compare
    with torchvision, timm and transformers.
    """
    for size in ((120, 90), (90, 120), (200, 40), (33, 35)):
        data = encoded(picture(*size, mode), "JPEG")
        for color, channels in ((Color.RGB, 3), (Color.GRAY, 1), (Color.GRAY, 3)):
            if channels == 1 and len(steps.mean) == 3:
                continue
            preprocess = Preprocess(steps, channels, color)
            expected = preprocess(decode_image(data, 0, reading=Reading(color)))
            assert torch.equal(images_for(preprocess, data)[0], expected)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", exact_images.FILTERS)
def test_every_size_has_pillows_pixels(mode: str, name: str) -> None:
    """Odd and even numbers of taps, rows and columns, and windows at every place."""
    draw = np.random.default_rng([len(name), len(mode)])
    for _ in range(60):
        # A large shrink has many taps, whose sums go beyond 16 bits many times over.
        most = 700 if draw.random() < 0.1 else 120
        height, width, new_height, new_width = draw.integers(1, (most, most, 100, 100)).tolist()
        noise = draw.integers(0, 256, (height, width, 3), np.uint8)
        noise = noise if draw.random() < 0.5 else noise // 128 * 255
        image = Image.fromarray(noise).convert(mode)
        top, left = draw.integers(0, (new_height, new_width)).tolist()
        rows, columns = draw.integers(1, (new_height - top + 1, new_width - left + 1)).tolist()
        pixels = exact_images.pixels_of(image)
        channels = pixels.shape[2]
        target = np.empty((channels, rows, columns), np.float32)
        tables = np.tile(np.arange(256, dtype=np.float32), (channels, 1))
        kept = exact_images.Kept((new_height, new_width), (top, left, rows, columns))
        exact_images.convert(pixels, kept, name, tables, target)
        resized = image.resize((new_width, new_height), exact_images.FILTERS[name])
        expected = np.atleast_3d(resized)[top : top + rows, left : left + columns]
        used = expected.shape[2]
        assert np.array_equal(np.moveaxis(target, 0, -1)[..., :used], expected), (image.size, kept)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_files_have_pillows_pixels(
    mode: str, progressive: bool, subsampling: str, encoded: Encode
) -> None:
    """Every common kind of JPEG file has the pixels that Pillow decodes."""
    for height, width in ((1, 1), (7, 9), (65, 130), (211, 173)):
        data = encoded(
            picture(height, width, mode, height),
            "JPEG",
            subsampling=subsampling,
            progressive=progressive,
        )
        got = decode_pixels(data, 0)
        assert isinstance(got, np.ndarray)
        expected = np.asarray(decode_image(data, 0))
        assert np.array_equal(np.broadcast_to(got[..., :3], expected.shape), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photographs_equal_the_reference(orientation: int, encoded: Encode) -> None:
    """A photograph with an EXIF orientation is turned before it is resized, as by the reference."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(90, 140), "JPEG", exif=exif)
    steps = Steps(resize=(64,), crop=(56, 48))
    for applied in (True, False):
        preprocess = Preprocess(steps, exif_orientation=applied)
        reading = Reading(exif_orientation=applied)
        expected = preprocess(decode_image(data, 0, reading=reading))
        assert torch.equal(images_for(preprocess, data)[0], expected)


def test_only_the_size_that_was_checked_is_decoded(encoded: Encode) -> None:
    """If libjpeg read another size in a file than Pillow, whose size the limits allowed, no pixel.

    No file is known for which the two differ.
    """
    data = encoded(picture(16, 20), "JPEG")
    assert exact_images.jpeg_pixels(data, (20, 16), gray=False) is not None
    assert exact_images.jpeg_pixels(data, (20, 15), gray=False) is None


def test_damaged_files_fare_as_with_pillow(encoded: Encode) -> None:
    """A byte changed anywhere: the same pixels as Pillow's, or a refusal where Pillow refuses."""
    whole = encoded(picture(40, 56), "JPEG", quality=60)
    rng = np.random.default_rng(2)
    outcomes = set()
    for _ in range(400):
        data = bytearray(whole)
        data[int(rng.integers(20, len(data)))] = int(rng.integers(256))
        if rng.random() < 0.2:
            del data[int(rng.integers(100, len(data))) :]
        outcomes.add(_outcome(bytes(data)))
    assert outcomes == {"pixels", "refused"}


def _outcome(data: bytes) -> str:
    try:
        expected = np.asarray(decode_image(data, 0))
    except InvalidInputError as error:
        with pytest.raises(type(error)):
            decode_pixels(data, 0)
        return "refused"
    got = decode_pixels(data, 0)
    assert isinstance(got, np.ndarray)
    assert np.array_equal(np.broadcast_to(got[..., :3], expected.shape), expected)
    return "pixels"


@pytest.mark.usefixtures("unproven")
@pytest.mark.parametrize("what", ["decoder", "resize"])
def test_one_other_byte_and_the_reference_is_used(
    what: str,
    photo: Image.Image,
    photo_bytes: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If this machine's libraries disagree in one byte, Pillow and torchvision do the work."""
    if what == "decoder":
        decode = exact_images.jpeg_pixels

        def off_by_one(data: bytes, size: tuple[int, int], *, gray: bool) -> exact_images.Pixels:
            pixels = decode(data, size, gray=gray)
            assert pixels is not None
            pixels[3, 5, 0] ^= 1
            return pixels

        monkeypatch.setattr(exact_images, "jpeg_pixels", off_by_one)
    else:
        monkeypatch.setattr(exact_images, "_is_vertical_first", lambda *_sizes: True)
    preprocess = Preprocess(Steps(resize=(64,), crop=(56, 56)))

    with caplog.at_level(logging.WARNING):
        assert not preprocess.is_fast
        assert not preprocess.is_fast

    assert len(caplog.records) == 1
    assert f"the {what} of Pillow" in caplog.text
    assert isinstance(preprocess.decode(photo_bytes, 0), Image.Image)
    assert torch.equal(images_for(preprocess, photo_bytes)[0], preprocess(photo))


@pytest.mark.usefixtures("unproven")
def test_without_the_library_pillow_decodes(
    photo: Image.Image,
    photo_bytes: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """simplejpeg is missing: a log line says so, and the values are the same."""
    monkeypatch.setattr(exact_images, "simplejpeg", None)
    preprocess = Preprocess(Steps(resize=(64,), crop=(56, 56)))
    assert not preprocess.is_fast
    assert "simplejpeg is not installed" in caplog.text
    assert torch.equal(images_for(preprocess, photo_bytes)[0], preprocess(photo))
