"""What a user sets about a model's image preprocessing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from layertap.errors import ConfigError
from layertap.models.images import Color

__all__ = ["INTERPOLATIONS", "NOTHING_SET", "ImageSettings"]

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""Pillow's filters, by the names that torchvision gives them."""


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """Steps of the image preprocessing that take the place of the model's own.

    A field that is None leaves the step as the model's configuration says.

    Attributes:
        mean: Subtracted from values in [0, 1]: one number for each channel or one for all; empty
            for none.
        std: The values are divided by it after that; as ``mean``, all above 0.
        resize: One size for the image's short side, or a height and a width; empty for no resizing.
        crop: One size or a height and a width, cut out of the centre; empty for no cropping.
        interpolation: How resizing interpolates, one of ``INTERPOLATIONS``.
        color: ``"rgb"`` or ``"gray"``, the channels that files are decoded to.
        exif_orientation: Whether the EXIF orientation is applied.

    Raises:
        ConfigError: a value is out of range; the message names it.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: tuple[int, ...] | None = None
    crop: tuple[int, ...] | None = None
    interpolation: str | None = None
    color: str | None = None
    exif_orientation: bool | None = None

    def __post_init__(self) -> None:
        self._check_numbers("image_mean", self.mean, all(map(math.isfinite, self.mean or ())))
        positive = all(0 < value < math.inf for value in self.std or ())
        self._check_numbers("image_std", self.std, positive)
        _check_sizes("image_resize", self.resize)
        _check_sizes("image_crop", self.crop)
        _check_choice("image_interpolation", self.interpolation, INTERPOLATIONS)
        _check_choice("image_color", self.color, tuple(Color))

    @property
    def given(self) -> tuple[str, ...]:
        """The fields that are set, by the names that they have in ``[[models]]``."""
        return tuple(
            field.name if field.name == "exif_orientation" else f"image_{field.name}"
            for field in fields(self)
            if getattr(self, field.name) is not None
        )

    @staticmethod
    def _check_numbers(name: str, values: Sequence[float] | None, valid: bool) -> None:
        if values is not None and (len(values) not in (0, 1, 3) or not valid):
            above = " above 0" if name == "image_std" else ""
            raise ConfigError(
                f"{name}: got {list(values)}, expected a number{above} for each channel (3 or 1), "
                f"or none to leave the step out"
            )


def _check_sizes(name: str, values: Sequence[int] | None) -> None:
    if values is not None and (len(values) > 2 or min(values, default=1) < 1):
        raise ConfigError(
            f"{name}: got {list(values)}, expected one size, a height and a width, or none to "
            f"leave the step out"
        )


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value is not None and value not in choices:
        raise ConfigError(f"{name}: got {value!r}, expected {', '.join(choices)}")


NOTHING_SET = ImageSettings()
