"""Image configurations of models and checkpoints have the same effect as in their own libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from batches import images_for
from layertap.models.image_config import (
    ImageConfig,
    config_of_folder,
    config_of_module,
    config_of_timm,
)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def made(config: ImageConfig | None, item_shape: tuple[int, ...], image: Image.Image) -> Any:
    """Return the result of a configuration's steps for an image."""
    assert config is not None
    preprocess = config.preprocess(item_shape)
    assert preprocess is not None
    return preprocess(image)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(3, 224, 224), (3, 160, 224), (3, 400, 96)])
@pytest.mark.parametrize("share", [0.875, 0.9, 1.0])
def test_every_mode_of_timm_equals_its_transform(
    mode: str, size: tuple[int, ...], share: float, photo: Image.Image
) -> None:
    """Each crop mode, square or not, gives timm's create_transform's result bit for bit."""
    config = {
        "input_size": size,
        "crop_mode": mode,
        "crop_pct": share,
        "interpolation": "bicubic",
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
    }
    for image in (photo, photo.rotate(90, expand=True), photo.resize((50, 300))):
        expected = timm.data.create_transform(**config, is_training=False)(image)
        assert torch.equal(made(config_of_timm(config, ""), size, image), expected)


def test_16_bit_grayscale_is_padded_alike(encoded: Callable[..., bytes]) -> None:
    """The colour of timm's border has the same brightness for 16-bit pixels as for 8-bit ones."""
    config = {"crop_mode": "border", "crop_pct": 1.0, "mean": (0.5,), "std": (0.5,)}
    preprocess = config_of_timm(config, "").preprocess((1, 64, 64))
    assert preprocess is not None
    pixels = np.random.default_rng(0).integers(0, 256, (64, 20)).astype(np.uint8)
    shallow = encoded(Image.fromarray(pixels), "PNG")
    deep = encoded(Image.fromarray(pixels.astype(np.uint16) * 257), "PNG")

    one, other = (images_for(preprocess, data) for data in (shallow, deep))

    assert torch.allclose(one, other, atol=4 / 255)


def test_missing_keys_get_timms_defaults(photo: Image.Image) -> None:
    """A configuration with only a mean and standard deviation is completed by timm's rules."""
    module = torch.nn.Conv2d(3, 1, 1)
    module.pretrained_cfg = {"mean": CLIP_MEAN, "std": CLIP_STD, "input_size": (3, 96, 96)}
    resolved = timm.data.resolve_data_config({}, model=module)
    expected = timm.data.create_transform(**resolved, is_training=False)(photo)

    config = config_of_module(module)

    assert torch.equal(made(config, (3, 96, 96), photo), expected)
    assert config is not None
    assert (config.shape, config.assumed) == ((3, 96, 96), ())


@pytest.mark.parametrize(
    ("mode", "reference"),
    [
        (
            "shortest",
            [transforms.Resize(96, InterpolationMode.BICUBIC), transforms.CenterCrop(96)],
        ),
        ("squash", [transforms.Resize((96, 96), InterpolationMode.BICUBIC)]),
    ],
)
def test_open_clips_configuration_is_followed(
    mode: str, reference: list[Any], photo: Image.Image, tmp_path: Path
) -> None:
    """A visual tower's preprocess_cfg, and the file next to weights, give open_clip's steps."""
    settings = {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "resize_mode": mode}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"preprocess_cfg": settings, "model_cfg": {"vision_cfg": {"image_size": 96}}})
    )
    expected = transforms.Compose(
        [*reference, transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)]
    )(photo)

    of_module = config_of_module(SimpleNamespace(preprocess_cfg={**settings, "size": 96}))
    of_file = config_of_folder(tmp_path)

    for config in (of_module, of_file):
        assert config is not None
        assert config.shape == (3, 96, 96)
        assert torch.equal(made(config, (3, 96, 96), photo), expected)


def test_a_mean_and_deviation_alone_leave_the_rest_assumed(photo: Image.Image) -> None:
    """image_mean and image_std don't determine the resize and the crop."""
    config = config_of_module(SimpleNamespace(image_mean=CLIP_MEAN, image_std=list(CLIP_STD)))

    assert config is not None
    assert config.assumed == ("image_resize", "image_crop", "image_interpolation")
    assert made(config, (3, 64, 64), photo).shape == (3, 64, 64)


@pytest.mark.parametrize("module", [torch.nn.Conv2d(3, 1, 1), SimpleNamespace(image_mean="?")])
def test_a_module_that_says_nothing_has_no_configuration(module: Any) -> None:
    """Attributes of other types with the same names are ignored."""
    assert config_of_module(module) is None


HUGGING_FACE = {
    "do_resize": True,
    "size": {"shortest_edge": 128},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 96, "width": 96},
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}


@pytest.mark.parametrize(
    ("changes", "reference"),
    [
        ({}, [transforms.Resize(128, InterpolationMode.BICUBIC), transforms.CenterCrop(96)]),
        (
            {"do_center_crop": False, "size": {"height": 96, "width": 96}, "resample": 2},
            [transforms.Resize((96, 96))],
        ),
        (
            {"size": 128, "crop_size": 96},
            [transforms.Resize(128, InterpolationMode.BICUBIC), transforms.CenterCrop(96)],
        ),
    ],
)
def test_hugging_faces_image_processor_is_followed(
    changes: dict[str, Any], reference: list[Any], photo: Image.Image, tmp_path: Path
) -> None:
    """The preprocessor_config.json next to weights gives the steps that it describes."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HUGGING_FACE | changes))
    normal = transforms.Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    expected = transforms.Compose([*reference, transforms.ToTensor(), normal])(photo)

    config = config_of_folder(tmp_path)

    assert config is not None
    assert config.shape == (3, 96, 96)
    assert config.origin == "the checkpoint's preprocessor_config.json"
    assert torch.equal(made(config, (3, 96, 96), photo), expected)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (json.dumps(HUGGING_FACE | {"do_rescale": False}), "rescaled"),
        (json.dumps(HUGGING_FACE | {"rescale_factor": 1 / 127.5}), "rescaled"),
        (json.dumps(HUGGING_FACE | {"crop_pct": 0.9}), "crop_pct"),
        (json.dumps(HUGGING_FACE | {"resample": "x"}), "invalid literal"),
        ("{", "Expecting"),
    ],
)
def test_what_can_not_be_followed_is_logged(
    content: str, word: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Unsupported steps and broken files are ignored and named in the log."""
    (tmp_path / "preprocessor_config.json").write_text(content)

    assert config_of_folder(tmp_path) is None
    assert "preprocessor_config.json is ignored" in caplog.text
    assert word in caplog.text


def test_timms_hub_configuration_is_followed(photo: Image.Image, tmp_path: Path) -> None:
    """config.json with a pretrained_cfg is timm's; other config.json files are ignored."""
    inner = {"input_size": [3, 96, 96], "crop_pct": 1.0, "interpolation": "bicubic"}
    inner |= {"mean": CLIP_MEAN, "std": CLIP_STD}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": inner}))
    resolved = timm.data.resolve_data_config({}, pretrained_cfg=inner)
    expected = timm.data.create_transform(**resolved, is_training=False)(photo)

    assert torch.equal(made(config_of_folder(tmp_path), (3, 96, 96), photo), expected)

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "image_size": 96}))
    assert config_of_folder(tmp_path) is None
