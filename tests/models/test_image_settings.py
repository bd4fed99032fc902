"""The user's settings of the image preprocessing are checked before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
from torchvision.transforms import InterpolationMode

from layertap.errors import ConfigError
from layertap.models import ImageSettings
from layertap.settings.image_settings import INTERPOLATIONS


def test_interpolations_are_torchvisions() -> None:
    """Each name is one of torchvision's, and a filter of Pillow."""
    assert {InterpolationMode(name).value for name in INTERPOLATIONS} == set(INTERPOLATIONS)


def test_what_is_given_is_named_as_in_the_configuration() -> None:
    """An empty tuple, zero and false count as given; None does not."""
    settings = ImageSettings(mean=(), crop=(8,), exif_orientation=False)
    assert settings.given == ("image_mean", "image_crop", "exif_orientation")
    assert ImageSettings().given == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": (0.5, 0.5)}, r"image_mean: got \[0.5, 0.5\], expected a number for each channel"),
        ({"mean": (float("nan"),)}, r"image_mean: got \[nan\]"),
        ({"std": (0.0,)}, r"image_std: got \[0.0\], expected a number above 0"),
        ({"std": (float("inf"),)}, r"image_std: got \[inf\]"),
        ({"resize": (1, 2, 3)}, r"image_resize: got \[1, 2, 3\], expected one size"),
        ({"crop": (0,)}, r"image_crop: got \[0\]"),
        ({"interpolation": "cubic"}, "image_interpolation: got 'cubic', expected nearest"),
        ({"color": "bgr"}, "image_color: got 'bgr', expected rgb, gray"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    """The message names the key, the value and what was expected."""
    with pytest.raises(ConfigError, match=message):
        ImageSettings(**values)
