"""Draws the photos of docs/recipes.md: patterns, copies of them, and parts with defects."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

__all__ = ["LABELS", "draw_parts", "draw_patterns", "draw_photos"]

LABELS = ("blank", "dots", "stripes")
"""What the patterns are: the folders of ``draw_patterns``."""

_SIDE = 224


def _background(draw: np.random.Generator) -> Image.Image:
    """Return a smooth background of random colours with noise."""
    small = draw.integers(60, 200, (4, 4, 3), np.uint8)
    smooth = Image.fromarray(small).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth, np.float32) + draw.normal(0, 6, (_SIDE, _SIDE, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _pattern(label: str, draw: np.random.Generator) -> Image.Image:
    image = _background(draw)
    pen = ImageDraw.Draw(image)
    colour = tuple(draw.integers(0, 256, 3).tolist())
    if label == "dots":
        for x, y in draw.integers(0, _SIDE, (60, 2)).tolist():
            pen.ellipse((x - 7, y - 7, x + 7, y + 7), fill=colour)
    elif label == "stripes":
        for offset in range(int(draw.integers(0, 16)), _SIDE, 16):
            pen.rectangle((0, offset, _SIDE, offset + 6), fill=colour)
    return image.filter(ImageFilter.GaussianBlur(0.7))


def draw_patterns(folder: Path, count: int) -> None:
    """Draw that many photos of each pattern into ``folder/LABEL``."""
    for number, label in enumerate(LABELS):
        (folder / label).mkdir(parents=True)
        draw = np.random.default_rng(number)
        for index in range(count):
            _pattern(label, draw).save(folder / label / f"{index:03}.jpg", quality=92)


def draw_photos(folder: Path, count: int) -> list[tuple[str, str]]:
    """Draw photos, two copies of some, and one file that is no photo; return pairs of copies."""
    folder.mkdir()
    draw = np.random.default_rng(10)
    for index in range(count):
        image = _pattern(LABELS[index % 3], draw)
        image.save(folder / f"{index:03}.jpg", quality=95)
    pairs = []
    for index, name in ((1, "resized.jpg"), (4, "compressed.jpg")):
        image = Image.open(folder / f"{index:03}.jpg")
        if name == "resized.jpg":
            image = image.resize((160, 160), Image.Resampling.LANCZOS)
        image.save(folder / name, quality=95 if name == "resized.jpg" else 30)
        pairs.append((f"photos/{index:03}.jpg", f"photos/{name}"))
    (folder / "broken.jpg").write_bytes(b"no photo")
    return pairs


def _part(draw: np.random.Generator) -> Image.Image:
    """Return a round metal part with six holes, lit a little differently each time."""
    image = Image.new("RGB", (_SIDE, _SIDE), (30, 32, 36))
    pen = ImageDraw.Draw(image)
    bright = int(150 + draw.integers(-3, 4))
    for radius in range(90, 0, -6):
        shade = bright + (radius // 6 % 2) * 14
        box = (112 - radius, 112 - radius, 112 + radius, 112 + radius)
        pen.ellipse(box, fill=(shade, shade, shade + 6))
    for hole in range(6):
        turn = hole * math.tau / 6
        x, y = 112 + 62 * math.cos(turn), 112 + 62 * math.sin(turn)
        pen.ellipse((x - 10, y - 10, x + 10, y + 10), fill=(20, 20, 24))
    noisy = np.asarray(image, np.float32) + draw.normal(0, 1.5, (_SIDE, _SIDE, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def draw_parts(good: Path, parts: Path, count: int) -> dict[str, tuple[int, int]]:
    """Draw good parts, and parts of which two have a defect.

    Returns:
        For each part with a defect its name, and the defect's place in the photo, x and y.
    """
    draw = np.random.default_rng(20)
    for folder in (good, parts):
        folder.mkdir()
        for index in range(count if folder == good else 2):
            _part(draw).save(folder / f"good_{index:02}.png")
    scratched, stained = _part(draw), _part(draw)
    ImageDraw.Draw(scratched).line((96, 60, 150, 92), fill=(250, 250, 235), width=5)
    scratched.save(parts / "scratched.png")
    ImageDraw.Draw(stained).ellipse((64, 118, 98, 146), fill=(200, 60, 20))
    stained.save(parts / "stained.png")
    return {f"{parts.name}/scratched.png": (123, 76), f"{parts.name}/stained.png": (81, 132)}
