"""Reads the image preprocessing from the configuration of a model or checkpoint."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from layertap.models.checkpoint_files import CONFIG_FILES
from layertap.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from layertap.models.steps import ResizeMode, Steps

__all__ = ["ImageConfig", "config_of_folder", "config_of_module", "config_of_timm"]

_log = logging.getLogger(__name__)

# The numbers of PIL.Image.Resampling, which Hugging Face's image processors store.
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What a configuration says about a model's images.

    Attributes:
        shape: The ``(C, H, W)`` that the model was made for; None if not stated.
        steps: Returns the steps for items of a given height and width.
        origin: Where the configuration was found, for clients.
        assumed: The steps that it does not state, by their names in ``[[models]]``.
    """

    shape: tuple[int, ...] | None
    steps: Callable[[int, int], Steps]
    origin: str
    assumed: tuple[str, ...] = ()

    def preprocess(self, item: tuple[int, ...]) -> Preprocess | None:
        """Return the preprocessing for items of this shape; None if they are not images."""
        if len(item) != 3:
            return None
        steps = self.steps(*item[1:])
        assumed = self.assumed
        if len(steps.mean) not in (0, 1, item[0]):
            # Statistics of colour channels do not fit a model that was built for one channel.
            steps = replace(steps, mean=(), std=(), fill=())
            assumed = ("image_mean", "image_std", *assumed)
        return Preprocess(steps, item[0], origin=self.origin, assumed=assumed)


def config_of_module(module: Any) -> ImageConfig | None:
    """Return what a module's attributes say, as timm and open_clip set them; None if nothing.

    This reads ``pretrained_cfg`` or ``default_cfg`` (timm), then ``preprocess_cfg`` (open_clip),
    then ``image_mean`` and ``image_std`` (open_clip). With the last two, other steps are assumed.
    """
    for name in ("pretrained_cfg", "default_cfg"):
        config = _mapping(getattr(module, name, None))
        if config.get("mean") and config.get("std"):
            return config_of_timm(config, f"the model's {name}")
    config = _mapping(getattr(module, "preprocess_cfg", None))
    if config.get("mean") and config.get("std"):
        return _of_open_clip(config, "the model's preprocess_cfg")
    mean, std = (_numbers(getattr(module, name, None)) for name in ("image_mean", "image_std"))
    if mean and std:
        return _of_statistics(mean, std)
    return None


def config_of_timm(config: Mapping[str, Any], origin: str) -> ImageConfig:
    """Return what a timm configuration says, by the rules of timm's evaluation transform.

    Args:
        config: As ``timm.data.resolve_data_config`` returns it. Missing keys have timm's defaults.
        origin: Where it was found, for clients.
    """
    share = float(config.get("crop_pct") or 0.875)
    mean = _numbers(config.get("mean")) or IMAGENET_MEAN
    std = _numbers(config.get("std")) or IMAGENET_STD
    interpolation = str(config.get("interpolation") or "bicubic")
    mode = config.get("crop_mode") or "center"

    def steps(height: int, width: int) -> Steps:
        size = (math.floor(height / share), math.floor(width / share))
        resize: tuple[int, ...] = size
        fill: tuple[int, ...] = ()
        if mode == "squash":
            resize_mode = ResizeMode.EXACT
        elif mode == "border":
            resize_mode = ResizeMode.CONTAIN
            fill = tuple(round(255 * value) for value in mean)
        elif size[0] == size[1]:
            resize, resize_mode = size[:1], ResizeMode.SHORT_SIDE
        else:
            resize_mode = ResizeMode.COVER
        return Steps(resize, resize_mode, interpolation, (height, width), fill, mean, std)

    shape = config.get("input_size")
    return ImageConfig(tuple(shape) if shape else None, steps, origin)


def config_of_folder(folder: Path) -> ImageConfig | None:
    """Return what the files in a checkpoint's folder say about images; None if nothing.

    This reads the image or video processor in ``processor_config.json``, then
    ``video_preprocessor_config.json`` and ``preprocessor_config.json`` (all of Hugging Face),
    ``config.json`` with timm's ``pretrained_cfg``, and ``open_clip_config.json``. A file that can't
    be read, or that needs steps which layertap doesn't support, is logged and ignored.
    """
    readers = (
        *(_of_processor, _of_hugging_face, _of_hugging_face),
        *(_of_timm_hub, _of_open_clip_hub),
    )
    for name, read in zip(CONFIG_FILES, readers, strict=True):
        file = folder / name
        if not file.is_file():
            continue
        try:
            config = read(_mapping(json.loads(file.read_text("utf-8"))), f"the checkpoint's {name}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("image preprocessing of %s is ignored: %s", file, error)
            continue
        if config is not None:
            return config
    return None


def _of_timm_hub(config: Mapping[str, Any], origin: str) -> ImageConfig | None:
    inner = _mapping(config.get("pretrained_cfg"))
    return config_of_timm(inner, origin) if inner.get("mean") and inner.get("std") else None


def _of_open_clip_hub(config: Mapping[str, Any], origin: str) -> ImageConfig | None:
    inner = dict(_mapping(config.get("preprocess_cfg")))
    vision = _mapping(_mapping(config.get("model_cfg")).get("vision_cfg"))
    inner.setdefault("size", vision.get("image_size"))
    return _of_open_clip(inner, origin) if inner.get("mean") and inner.get("std") else None


def _of_open_clip(config: Mapping[str, Any], origin: str) -> ImageConfig:
    """Return the steps that open_clip's ``image_transform`` derives from its PreprocessCfg."""
    mode = str(config.get("resize_mode") or "shortest")
    if mode not in ("shortest", "longest", "squash"):
        raise ValueError(f"resize_mode {mode!r} is not known")
    mean, std = _numbers(config["mean"]), _numbers(config["std"])
    interpolation = str(config.get("interpolation") or "bicubic")
    grey = int(config.get("fill_color") or 0)

    def steps(height: int, width: int) -> Steps:
        resize: tuple[int, ...] = (height, width)
        fill: tuple[int, ...] = ()
        if mode == "squash":
            resize_mode = ResizeMode.EXACT
        elif mode == "longest":
            resize_mode, fill = ResizeMode.CONTAIN, (grey,) * 3
        elif height == width:
            resize, resize_mode = (height,), ResizeMode.SHORT_SIDE
        else:
            resize_mode = ResizeMode.COVER
        return Steps(resize, resize_mode, interpolation, (height, width), fill, mean, std)

    size = _size(config.get("size"))
    return ImageConfig((3, *size) if size else None, steps, origin)


def _of_processor(config: Mapping[str, Any], origin: str) -> ImageConfig | None:
    """Return what a Hugging Face processor for several kinds of input does with images."""
    for key in ("image_processor", "video_processor"):
        if found := _of_hugging_face(_mapping(config.get(key)), origin):
            return found
    return None


def _of_hugging_face(config: Mapping[str, Any], origin: str) -> ImageConfig | None:
    """Return what a Hugging Face image processor does; None if it is not an image processor.

    Raises:
        ValueError: For a step that layertap doesn't support.
    """
    # A feature extractor of audio normalises, too.
    about_images = "image_mean" in config or "do_normalize" in config
    if not about_images or "sampling_rate" in config:
        return None
    for key in ("crop_pct", "do_pad", "do_flip_channel_order"):
        if config.get(key):
            raise ValueError(f"{key} is not supported; set the steps by image_* instead")
    if config.get("do_rescale", True) is False or not math.isclose(
        float(config.get("rescale_factor") or 1 / 255), 1 / 255, rel_tol=1e-3
    ):
        raise ValueError("its values are not rescaled to [0, 1], which layertap always does")
    normal = config.get("do_normalize", True)
    mean = _numbers(config.get("image_mean")) if normal else ()
    std = _numbers(config.get("image_std")) if normal else ()
    interpolation = _RESAMPLE[int(config.get("resample", 2))]
    resize = _mapping_or_size(config.get("size")) if config.get("do_resize", True) else ()
    cropped = config.get("do_center_crop") and config.get("crop_size") is not None
    crop = _size(config.get("crop_size")) if cropped else ()
    whole = crop or (resize if len(resize) == 2 else ())

    def steps(height: int, width: int) -> Steps:
        # At another size than the configuration's, show the same part of the picture.
        scale = max(height, width) / max(whole) if whole else 1.0
        own = (height, width) == whole
        sizes = resize if own else tuple(round(size * scale) for size in resize)
        if len(resize) == 2 and not crop:
            sizes = (height, width)
        exact = len(sizes) == 2
        mode = ResizeMode.EXACT if exact else ResizeMode.SHORT_SIDE
        return Steps(
            sizes,
            mode,
            interpolation,
            (height, width) if crop else (),
            mean=mean,
            std=std,
            crop_down=bool(crop),
        )

    return ImageConfig((len(mean) or 3, *whole) if whole else None, steps, origin)


def _of_statistics(mean: tuple[float, ...], std: tuple[float, ...]) -> ImageConfig:
    def steps(height: int, width: int) -> Steps:
        return Steps(
            (round(max(height, width) * 256 / 224),), crop=(height, width), mean=mean, std=std
        )

    assumed = ("image_resize", "image_crop", "image_interpolation")
    return ImageConfig(None, steps, "the model's image_mean and image_std", assumed)


def _mapping_or_size(size: Any) -> tuple[int, ...]:
    if isinstance(size, Mapping) and "shortest_edge" in size:
        if "longest_edge" in size:
            raise ValueError("a longest_edge is not supported; set the steps by image_* instead")
        return (int(size["shortest_edge"]),)
    # A single number is the size of the short side; two numbers are height and width.
    return (size,) if isinstance(size, int) else _size(size)


def _size(size: Any) -> tuple[int, ...]:
    """Return the height and width of a configuration's size entry; empty if it is None."""
    if size is None:
        return ()
    if isinstance(size, Mapping):
        return int(size["height"]), int(size["width"])
    sizes = [size, size] if isinstance(size, int) else list(size)
    return int(sizes[0]), int(sizes[-1])


def _mapping(value: Any) -> Mapping[str, Any]:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value if isinstance(value, Mapping) else {}


def _numbers(values: Any) -> tuple[float, ...]:
    """Return a configuration's numbers; empty if they are not one or three numbers."""
    try:
        numbers = tuple(map(float, values))
    except (TypeError, ValueError):
        return ()
    return numbers if len(numbers) in (1, 3) else ()
