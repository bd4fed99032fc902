from __future__ import annotations

import pytest
import torch
from PIL import Image
from torchvision import models

from layertap.errors import ModelLoadError
from layertap.models import InputSpec
from layertap.models.torchvision_catalogue import find_builder
from layertap.models.torchvision_inputs import input_spec, preprocess
from layertap.models.torchvision_source import _options


def takes(name: str, item_shape: tuple[int, ...] | None = None) -> InputSpec:
    """Return a builder's input, from a module whose weights have no values."""
    builder = find_builder(name)
    with torch.device("meta"):
        module = builder.build(**_options(builder))
    return input_spec(builder, builder.reference(), module, item_shape)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", InputSpec((3, 224, 224), (1, 2))),
        ("inception_v3", InputSpec((3, 299, 299), (1, 2))),
        ("efficientnet_b3", InputSpec((3, 300, 300), (1, 2))),
        ("swin_v2_t", InputSpec((3, 256, 256), (1, 2))),
        ("vit_b_32", InputSpec((3, 224, 224))),
        ("maxvit_t", InputSpec((3, 224, 224))),
        ("r3d_18", InputSpec((3, 16, 112, 112), (1, 2, 3))),
        ("s3d", InputSpec((3, 16, 224, 224), (1, 2, 3))),
        ("mvit_v2_s", InputSpec((3, 16, 224, 224))),
        ("swin3d_t", InputSpec((3, 16, 112, 112), (1, 2, 3))),
        ("lraspp_mobilenet_v3_large", InputSpec((3, 224, 224), (1, 2))),
        ("ssdlite320_mobilenet_v3_large", InputSpec((3, 256, 256), (1, 2))),
    ],
)
def test_default_items(name: str, expected: InputSpec) -> None:
    """Each family has its default item; models with fixed position encodings have a fixed size."""
    assert takes(name) == expected


def test_an_item_shape_takes_the_defaults_place() -> None:
    """A shape that the model can take becomes the default item; the rest is unchanged."""
    assert takes("resnet18", (3, 64, 96)) == InputSpec((3, 64, 96), (1, 2))


@pytest.mark.parametrize(
    ("name", "item_shape"),
    [
        ("resnet18", (1, 224, 224)),
        ("resnet18", (224, 224)),
        ("r3d_18", (3, 224, 224)),
        ("maxvit_t", (3, 256, 256)),
    ],
)
def test_item_shapes_that_cannot_be_are_refused(name: str, item_shape: tuple[int, ...]) -> None:
    """Wrong channels, a wrong rank, and another size for a fixed-size model are refused."""
    with pytest.raises(ModelLoadError, match=f"item shape of {name}: got "):
        takes(name, item_shape)


def test_video_takes_no_images() -> None:
    """A video model has no preprocessing for an image."""
    builder = find_builder("r3d_18")

    assert preprocess(builder.family, builder.reference(), takes("r3d_18")) is None


@pytest.mark.parametrize(
    ("name", "item_shape", "steps"),
    [
        ("resnet18", (3, 224, 224), "resize 256 (bilinear, antialias), center crop 224,"),
        ("resnet50", (3, 224, 224), "resize 256 (bilinear, antialias), center crop 224,"),
        ("inception_v3", (3, 299, 299), "resize 342 (bilinear, antialias), center crop 299,"),
        ("resnet18", (3, 112, 112), "resize 128 (bilinear, antialias), center crop 112,"),
        ("resnet18", (3, 112, 56), "resize 128 (bilinear, antialias), center crop 112 x 56,"),
    ],
)
def test_images_become_default_items(
    name: str, item_shape: tuple[int, ...], steps: str, photo: Image.Image
) -> None:
    """An image gets the default item's size, with the same field of view."""
    builder = find_builder(name)

    made = preprocess(builder.family, builder.reference(), InputSpec(item_shape, (1, 2)))

    assert made is not None
    assert f"RGB (alpha dropped), {steps}" in made.describe()
    assert made(photo).shape == item_shape


def test_one_models_item_shape_leaves_the_weights_alone() -> None:
    """Each model gets new transforms, so another model's crop has no effect."""
    builder = find_builder("resnet18")
    preprocess(builder.family, builder.reference(), InputSpec((3, 64, 64), (1, 2)))

    assert models.ResNet18_Weights.IMAGENET1K_V1.transforms().crop_size == [224]
