"""Images, resized and looked up in tables; see ``layertap._core.image_values``.

The weights and their rounding are those of Pillow's src/libImaging/Resample.c for 8 bits per
channel: the sum of each pixel is calculated in whole numbers, so that no order of additions
matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

_BITS = 22
_MAX_SIDE = 2**24

_Bytes = NDArray[np.uint8]


def _box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def _bilinear(x: float) -> float:
    return max(1.0 - abs(x), 0.0)


def _hamming(x: float) -> float:
    x = abs(x)
    if x == 0.0 or x >= 1.0:
        return float(x == 0.0)
    x *= math.pi
    # Pillow's constants are single-precision numbers.
    return math.sin(x) / x * (float(np.float32(0.54)) + float(np.float32(0.46)) * math.cos(x))


def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2.0 else 0.0


def _sinc(x: float) -> float:
    x *= math.pi
    return 1.0 if x == 0.0 else math.sin(x) / x


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3.0 <= x < 3.0 else 0.0


_FILTERS: dict[str, tuple[Callable[[float], float], float]] = {
    "box": (_box, 0.5),
    "bilinear": (_bilinear, 1.0),
    "hamming": (_hamming, 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}


def image_values(
    pixels: Buffer,
    *,
    size: Sequence[int],
    window: Sequence[int],
    interpolation: str,
    vertical_first: bool,
    tables: Buffer,
    target: Buffer,
) -> None:
    """See ``layertap._core.image_values``."""
    image = _pixels(pixels)
    height, width = _size(size)
    top, left, rows, columns = _window(window, height, width)
    if interpolation not in _FILTERS:
        raise ValueError(
            f"interpolation: got {interpolation}, "
            "expected box, bilinear, hamming, bicubic or lanczos"
        )
    entries = _tables(tables, image.shape[2])
    view = memoryview(target)
    if view.readonly or not view.c_contiguous:
        raise BufferError("target: not writable and contiguous")
    needed = len(entries) * rows * columns * 4
    if view.nbytes != needed:
        raise ValueError(f"target: got {view.nbytes} bytes, expected {needed}")
    if image.shape[:2] != (height, width):
        # Axis 0 is vertical.
        for axis in (0, 1) if vertical_first else (1, 0):
            begin, count, to = (top, rows, height) if axis == 0 else (left, columns, width)
            image = _resized(image, axis, to, (begin, count), interpolation)
    else:
        image = image[top : top + rows, left : left + columns]
    values = np.frombuffer(view, np.float32).reshape(len(entries), rows, columns)
    for channel, table in enumerate(entries):
        values[channel] = table[image[..., channel if image.shape[2] > 1 else 0]]


def _resized(image: _Bytes, axis: int, to: int, part: tuple[int, int], name: str) -> _Bytes:
    """Resize one axis to ``to`` pixels and keep the part (begin, count) of it."""
    lines = np.moveaxis(image, axis, 0).astype(np.int64)
    begin, count = part
    made = np.empty((count, *lines.shape[1:]), np.uint8)
    for at in range(count):
        first, weights = _taps(len(lines), to, begin + at, name)
        sums = np.tensordot(weights, lines[first : first + len(weights)], 1)
        made[at] = np.clip((sums + (1 << (_BITS - 1))) >> _BITS, 0, 255)
    return np.ascontiguousarray(np.moveaxis(made, 0, axis))


def _taps(from_: int, to: int, at: int, name: str) -> tuple[int, NDArray[np.int64]]:
    """Return the first source pixel of pixel ``at``, and the weights from there on."""
    weight, reach = _FILTERS[name]
    scale = from_ / to
    stretch = max(scale, 1.0)
    support = reach * stretch
    center = (at + 0.5) * scale
    first = max(int(center - support + 0.5), 0)
    last = min(int(center + support + 0.5), from_)
    inverse = 1.0 / stretch
    shares = [weight((place - center + 0.5) * inverse) for place in range(first, last)]
    total = 0.0
    for share in shares:
        total += share  # not sum(), which rounds once at the end since Python 3.12
    fixed = [(share if total == 0.0 else share / total) * (1 << _BITS) for share in shares]
    return first, np.array([int(value + (0.5 if value >= 0 else -0.5)) for value in fixed], int)


def _pixels(pixels: Buffer) -> _Bytes:
    view = memoryview(pixels)
    shape = view.shape or ()
    if not (
        len(shape) == 3
        and view.itemsize == 1
        and view.c_contiguous
        and all(0 < side <= _MAX_SIDE for side in shape[:2])
        and shape[2] in (1, 4)
    ):
        raise ValueError(
            "pixels: expected contiguous bytes [height, width, 1 or 4], with sides from 1 to 2**24"
        )
    return np.frombuffer(view, np.uint8).reshape(shape)


def _size(size: Sequence[int]) -> tuple[int, int]:
    sides = tuple(size)
    if len(sides) != 2 or not all(0 < side <= _MAX_SIDE for side in sides):
        raise ValueError("size: expected height and width, from 1 to 2**24")
    return sides[0], sides[1]


def _window(window: Sequence[int], height: int, width: int) -> tuple[int, int, int, int]:
    part = tuple(window)
    inside = len(part) == 4 and all(
        0 <= begin < side and 1 <= count <= side - begin
        for begin, count, side in ((part[0], part[2], height), (part[1], part[3], width))
    )
    if not inside:
        raise ValueError("window: expected top, left, height and width, inside the resized image")
    return part[0], part[1], part[2], part[3]


def _tables(tables: Buffer, channels: int) -> NDArray[np.float32]:
    view = memoryview(tables)
    shape = view.shape or ()
    if not (
        len(shape) == 2
        and view.itemsize == 4
        and shape[1] == 256
        and view.c_contiguous
        and (channels == 1 or shape[0] <= channels)
    ):
        raise ValueError("tables: expected contiguous float32 [count, 256], no more than channels")
    return np.frombuffer(view, np.float32).reshape(shape)
