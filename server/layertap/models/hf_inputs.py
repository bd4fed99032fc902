"""What a model of transformers takes, from its configuration and the files of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from layertap.errors import ModelLoadError
from layertap.models.image_config import ImageConfig, config_of_folder
from layertap.models.preprocess import Preprocess
from layertap.models.signature import IdRange, InputGuess, InputSpec
from layertap.settings import ModelSpec

__all__ = ["input_of", "preprocess_of"]

TOKENS = 16
"""The tokens of the text with which a model is measured, where it takes as many."""

SAMPLES = 16000
"""The samples of the waveform with which a model is measured: a second at the usual rate."""


def input_of(module: Any, spec: ModelSpec, folder: Path) -> InputSpec:
    """Return the main input of a model.

    Raises:
        ModelLoadError: The model's main input is of no known kind, and the spec has no item shape.
    """
    name = module.main_input_name
    config = module.config
    floating = module.dtype
    also = () if floating is torch.float32 else (torch.float32,)
    match name:
        case "input_ids":
            return _ids(module, spec)
        case "pixel_values":
            images = config_of_folder(folder)
            shape = spec.item_shape or _image_shape(config, images)
            if shape:
                guess = InputGuess(free=True)
                free = tuple(range(1, len(shape))) if len(shape) == 3 else ()
                return InputSpec(shape, free, floating, also, guess=guess if free else None)
        case "input_values":
            return InputSpec(spec.item_shape or (SAMPLES,), (0,), floating, also)
    if spec.item_shape is None:
        raise ModelLoadError(
            f"item shape of {spec.name}: the sizes of its input {name!r} are not known; give the "
            f"sizes of one item without the batch, such as --item-shape 80,3000"
        )
    return InputSpec(spec.item_shape, (), floating, also)


def preprocess_of(folder: Path, takes: InputSpec) -> Preprocess | None:
    """Return how the folder's image processor makes an item of an image; None if it has none."""
    images = config_of_folder(folder)
    return None if images is None else images.preprocess(takes.shape)


def _ids(module: Any, spec: ModelSpec) -> InputSpec:
    config = module.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or TOKENS
    shape = spec.item_shape or (min(TOKENS, longest),)
    padding = getattr(config, "pad_token_id", None)
    rows = _rows(module, config)
    ids = None if rows is None else IdRange(rows, padding if _is_id(padding, rows) else 0)
    return InputSpec(shape, (0,), torch.int64, (torch.int32,), ids=ids)


def _rows(module: Any, config: Any) -> int | None:
    """Return the rows of the table of words; the configuration may name fewer or more."""
    table = module.get_input_embeddings()
    rows = getattr(table, "num_embeddings", None) if isinstance(table, nn.Module) else None
    return rows if isinstance(rows, int) else getattr(config, "vocab_size", None)


def _is_id(value: Any, rows: int) -> bool:
    return isinstance(value, int) and 0 <= value < rows


def _image_shape(config: Any, images: ImageConfig | None) -> tuple[int, ...] | None:
    """Return ``(C, H, W)``, or ``(T, C, H, W)`` of a video; None if nothing says the size."""
    config = getattr(config, "vision_config", config)
    sizes = getattr(config, "image_size", None)
    if sizes is None and images is not None and images.shape is not None:
        return images.shape
    if sizes is None:
        return None
    height, width = (sizes, sizes) if isinstance(sizes, int) else (sizes[0], sizes[-1])
    item = (getattr(config, "num_channels", 3), height, width)
    frames = getattr(config, "num_frames", None)
    return (frames, *item) if isinstance(frames, int) else item
