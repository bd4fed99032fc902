"""``image_values``: an image resized, cropped and looked up, against Pillow and in both builds."""

from __future__ import annotations

import threading
import time
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from layertap import _core, _pure
from layertap.models.exact_images import FILTERS, Pixels, _is_vertical_first, pixels_of

cores = pytest.mark.parametrize("core", [_core, _pure], ids=["core", "pure"])
CASES = {_core: 400, _pure: 60}
IDENTITY = np.tile(np.arange(256, dtype=np.float32), (4, 1))


def converted(core: ModuleType, pixels: Pixels, **changes: Any) -> np.ndarray:
    """What a core makes of an image: by default its whole, as it is."""
    height, width, channels = pixels.shape
    size = changes.get("size", (height, width))
    arguments = {
        "size": size,
        "window": (0, 0, *size),
        "interpolation": "bilinear",
        "vertical_first": _is_vertical_first(height, width, *size),
        "tables": IDENTITY[: 1 if channels == 1 else 3],
        **changes,
    }
    target = np.full((len(arguments["tables"]), *arguments["window"][2:]), np.nan, np.float32)
    core.image_values(pixels, **{"target": target, **arguments})
    return target


def noise(rng: np.random.Generator, height: int, width: int, mode: str) -> Image.Image:
    """Random pixels, some rows and columns of them black or white, where sums are clipped."""
    shape = (height, width) if mode == "L" else (height, width, 3)
    array = rng.integers(0, 256, shape, np.uint8)
    array[rng.random(height) < 0.2] = 255
    array[:, rng.random(width) < 0.2] = 0
    return Image.fromarray(array)


@cores
def test_any_window_has_the_pixels_of_pillow(core: ModuleType) -> None:
    """Sizes, windows, filters and channels at random: not a byte differs from Pillow's resize."""
    rng = np.random.default_rng(7)
    for case in range(CASES[core]):
        (height, width), size = rng.integers(1, 150, 2).tolist(), rng.integers(1, 120, 2).tolist()
        mode = "L" if case % 2 else "RGB"
        name = list(FILTERS)[case % len(FILTERS)]
        top, left = (int(rng.integers(side)) for side in size)
        rows, columns = (
            int(rng.integers(1, side - begin + 1))
            for side, begin in zip(size, (top, left), strict=True)
        )
        image = noise(rng, height, width, mode)

        got = converted(
            core,
            pixels_of(image),
            size=size,
            window=(top, left, rows, columns),
            interpolation=name,
        )

        whole = np.atleast_3d(np.asarray(image.resize(size[::-1], FILTERS[name])))
        expected = whole[top : top + rows, left : left + columns]
        assert np.array_equal(np.moveaxis(got, 0, -1), expected), (height, width, size, name)


@cores
@pytest.mark.parametrize("vertical_first", [False, True])
def test_the_order_of_the_passes_is_kept(core: ModuleType, vertical_first: bool) -> None:
    """Each pass rounds to bytes, so the two orders differ; transposing swaps them."""
    image = pixels_of(noise(np.random.default_rng(3), 90, 40, "L"))
    turned = np.ascontiguousarray(image.transpose(1, 0, 2))

    got = converted(core, image, size=(30, 33), vertical_first=vertical_first)
    across = converted(core, turned, size=(33, 30), vertical_first=not vertical_first)
    other = converted(core, image, size=(30, 33), vertical_first=not vertical_first)

    assert np.array_equal(got[0], across[0].T)
    assert not np.array_equal(got, other)


@cores
def test_bytes_are_looked_up_by_channel(core: ModuleType) -> None:
    """Each channel has its table; one channel may have several."""
    rng = np.random.default_rng(5)
    tables = rng.standard_normal((3, 256)).astype(np.float32)
    colour = pixels_of(noise(rng, 6, 5, "RGB"))
    gray = pixels_of(noise(rng, 6, 5, "L"))

    of_colour = converted(core, colour, tables=tables)
    of_gray = converted(core, gray, tables=tables)

    for channel in range(3):
        assert np.array_equal(of_colour[channel], tables[channel][colour[..., channel]])
        assert np.array_equal(of_gray[channel], tables[channel][gray[..., 0]])


@cores
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"size": (4,)}, "size: expected"),
        ({"size": (0, 4), "window": (0, 0, 1, 1)}, "size: expected"),
        ({"size": (4, 2**24 + 1), "window": (0, 0, 1, 1)}, "size: expected"),
        ({"window": (0, 0, 4)}, "window: expected"),
        ({"window": (0, 0, 5, 4)}, "window: expected"),
        ({"window": (-1, 0, 1, 1)}, "window: expected"),
        ({"window": (0, 4, 1, 1)}, "window: expected"),
        ({"window": (0, 3, 1, 2**62)}, "window: expected"),
        ({"interpolation": "nearest"}, "interpolation: got nearest"),
        ({"tables": np.zeros((3, 255), np.float32)}, "tables: expected"),
        ({"tables": np.zeros((5, 256), np.float32)}, "tables: expected"),
        ({"tables": np.zeros((3, 256), np.float64)}, "tables: expected"),
        ({"tables": np.zeros((3, 512), np.float32)[:, ::2]}, "tables: expected"),
        ({"target": np.empty((3, 4, 3), np.float32)}, "target: got 144 bytes, expected 192"),
    ],
)
def test_what_does_not_fit_is_refused(
    core: ModuleType, changes: dict[str, Any], match: str
) -> None:
    """Nothing is read or written outside the buffers."""
    pixels = np.zeros((4, 4, 4), np.uint8)
    arguments = {
        "size": (4, 4),
        "window": (0, 0, 4, 4),
        "interpolation": "bilinear",
        "vertical_first": False,
        "tables": IDENTITY[:3],
        "target": np.empty((3, 4, 4), np.float32),
        **changes,
    }
    with pytest.raises(ValueError, match=match):
        core.image_values(pixels, **arguments)


@cores
@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((0, 4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint16),
        np.zeros((4, 8, 4), np.uint8)[:, ::2],
    ],
    ids=["2d", "3 channels", "empty", "uint16", "strided"],
)
def test_other_arrays_are_refused(core: ModuleType, pixels: np.ndarray) -> None:
    """Only contiguous bytes with one or four channels are read."""
    target = np.empty((1, 1, 1), np.float32)
    with pytest.raises(ValueError, match="pixels: expected"):
        core.image_values(
            pixels,
            size=(4, 4),
            window=(0, 0, 1, 1),
            interpolation="box",
            vertical_first=False,
            tables=IDENTITY[:1],
            target=target,
        )


@cores
def test_a_read_only_target_is_refused(core: ModuleType) -> None:
    """The target is written to, so it must allow that."""
    target = np.empty((3, 4, 4), np.float32)
    target.flags.writeable = False
    with pytest.raises((BufferError, ValueError), match="read-only|not writable"):
        converted(core, np.zeros((4, 4, 4), np.uint8), target=target)


def test_the_gil_is_released() -> None:
    """Another thread runs in the middle of the time in which a large image is resized."""
    seen: list[float] = []
    leave = threading.Event()

    def watch() -> None:
        while not leave.wait(0.001):
            seen.append(time.perf_counter())

    pixels = np.zeros((4000, 4000, 4), np.uint8)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        begun = time.perf_counter()
        converted(_core, pixels, size=(2000, 2000), interpolation="lanczos")
        ended = time.perf_counter()
    finally:
        leave.set()
        thread.join()
    third = (ended - begun) / 3
    assert any(begun + third < moment < ended - third for moment in seen)
