"""The user's settings for a model's image preprocessing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from layertap.errors import ConfigError
from layertap.settings import value_kinds as kinds
from layertap.settings.definition import Setting, definitions

__all__ = ["INTERPOLATIONS", "NOTHING_SET", "Color", "ImageSettings"]


class Color(StrEnum):
    """The channels that image files are decoded to."""

    RGB = "rgb"
    GRAY = "gray"


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""Pillow's filters, by their names in torchvision."""

_MODELS_OWN = "the model's own"


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """Steps of the image preprocessing that replace the model's own.

    If a field is None, the step stays as in the model's configuration. An empty tuple removes the
    step.

    Raises:
        ConfigError: If a value is out of range; the message names it.
    """

    mean: Annotated[
        tuple[float, ...] | None,
        Setting(
            "Subtract this from pixels in [0, 1]: one number for each channel or one for all; none "
            "turns normalisation off.",
            kinds.CHANNELS,
            key="image_mean",
            default=_MODELS_OWN,
        ),
    ] = None
    std: Annotated[
        tuple[float, ...] | None,
        Setting(
            "Then divide by this: one number above 0 for each channel or one for all; none turns "
            "the division off.",
            kinds.CHANNELS,
            key="image_std",
            default=_MODELS_OWN,
        ),
    ] = None
    resize: Annotated[
        tuple[int, ...] | None,
        Setting(
            "Resize images: one size is that of the short side, two are height and width; none "
            "turns resizing off.",
            kinds.IMAGE_SIZE,
            key="image_resize",
            default=_MODELS_OWN,
        ),
    ] = None
    crop: Annotated[
        tuple[int, ...] | None,
        Setting(
            "Crop the centre: one size for both sides, or height and width; none turns cropping "
            "off.",
            kinds.IMAGE_SIZE,
            key="image_crop",
            default=_MODELS_OWN,
        ),
    ] = None
    interpolation: Annotated[
        str | None,
        Setting(
            "How resizing interpolates.",
            kinds.choice(*INTERPOLATIONS),
            key="image_interpolation",
            default=_MODELS_OWN,
        ),
    ] = None
    color: Annotated[
        str | None,
        Setting(
            "The channels that image files are decoded to.",
            kinds.choice(*map(str, Color)),
            key="image_color",
            default=_MODELS_OWN,
        ),
    ] = None
    exif_orientation: Annotated[
        bool | None,
        Setting(
            "Rotate and flip images as their EXIF orientation says.", kinds.TRUTH, default="true"
        ),
    ] = None

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
        """The keys in ``[[models]]`` of the fields that are set."""
        return tuple(
            each.key for each in definitions(type(self)) if getattr(self, each.path[0]) is not None
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
