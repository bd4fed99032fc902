"""Finds the inputs of a transformers model, from its configuration and its folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layertap.errors import ModelLoadError
from layertap.models.arguments import parameters_of
from layertap.models.image_config import ImageConfig, config_of_folder
from layertap.models.preprocess import Preprocess
from layertap.models.signature import Boxes, IdRange, InputGuess, InputSpec, Mask
from layertap.models.text import IDS, MASK, TYPES
from layertap.settings import ModelSpec

__all__ = ["inputs_of", "preprocess_of"]

TOKENS = 16
"""Number of tokens with which a model is measured, unless it takes fewer."""

SAMPLES = 16000
"""Number of samples of the waveform with which a model is measured: usually a second."""

_PAGE = 1000
"""Height and width of a page, in the units of boxes."""

_DECODER_IDS = "decoder_input_ids"

_LENGTH, _OTHER_LENGTH, _TIME = "L", "S", "T"
"""Names of free dimensions: of a text, of a decoder's text, of a waveform."""


def inputs_of(module: Any, spec: ModelSpec, folder: Path) -> tuple[InputSpec, ...]:
    """Return the inputs of a model: the main one, then the others in the order of ``forward``.

    Raises:
        ModelLoadError: The kind of the main input is unknown, and the spec has no item shape.
    """
    main = _main(module, spec, folder)
    taken = {parameter.name for parameter in parameters_of(module)} - {main.name}
    known = [*_beside_main(module, main), *_of_decoder(module), *_of_vision(module, spec, folder)]
    inputs = (main, *(each for each in known if each.name in taken))
    return (*inputs, *(each for each in _of_pixels(inputs) if each.name in taken))


def _main(module: Any, spec: ModelSpec, folder: Path) -> InputSpec:
    name = module.main_input_name
    if name == "input_ids":
        return _ids(module, spec)
    if name == "pixel_values" and (pixels := _pixels(module, spec, folder)):
        return pixels
    floating, also = _floating(module)
    config = module.config
    mel, frames = (getattr(config, key, None) for key in ("num_mel_bins", "max_source_positions"))
    if name == "input_values" and mel and spec.item_shape is None:
        # A spectrogram of fixed length, as AST takes it.
        return InputSpec((config.max_length, mel), (), floating, also, name=name)
    if name == "input_values":
        shape = spec.item_shape or (SAMPLES,)
        free = (0,) if len(shape) == 1 else ()
        return InputSpec(shape, free, floating, also, name=name, symbols=(_TIME,) * len(free))
    if name == "input_features" and spec.item_shape is None and mel and frames:
        # Two convolutions in front of Whisper's encoder halve the frames.
        return InputSpec((mel, 2 * frames), (), floating, also, name=name)
    if spec.item_shape is None:
        raise ModelLoadError(
            f"item shape of {spec.name}: the sizes of its input {name!r} are not known; give the "
            f"sizes of one item without the batch, such as --item-shape 80,3000"
        )
    return InputSpec(spec.item_shape, (), floating, also, name=name)


def _floating(module: Any) -> tuple[torch.dtype, tuple[torch.dtype, ...]]:
    """Return the floating-point dtype of a model's inputs, and dtypes that are converted to it."""
    own = module.dtype
    return own, () if own is torch.float32 else (torch.float32,)


def _beside_main(module: Any, main: InputSpec) -> Iterator[InputSpec]:
    """Yield optional inputs that belong to token ids or a waveform, with the same length."""
    if len(main.shape) != 1:
        return
    yield _mask(MASK, main.shape, main.symbols)
    config = module.config.get_text_config()
    types = getattr(config, "type_vocab_size", 0)
    if isinstance(types, int) and types > 0:
        yield _optional(TYPES, main.shape, main.symbols, IdRange(types))
    pages = getattr(config, "max_2d_position_embeddings", 0)
    if isinstance(pages, int) and pages > 1:
        # A page is 1000 high and wide, whatever its size.
        boxes = _optional("bbox", (*main.shape, 4), main.symbols, Boxes(min(_PAGE, pages - 1)))
        yield boxes
    positions = getattr(config, "max_position_embeddings", 0)
    if isinstance(positions, int) and positions > 0:
        yield _optional("position_ids", main.shape, main.symbols, IdRange(positions))


def _of_decoder(module: Any) -> Iterator[InputSpec]:
    """Yield the decoder's inputs of a model that has an encoder and a decoder."""
    taken = {parameter.name for parameter in parameters_of(module)}
    # The decoder of a detector such as DETR takes no ids.
    if not getattr(module.config, "is_encoder_decoder", False) or _DECODER_IDS not in taken:
        return
    shape, symbols = (TOKENS // 2,), (_OTHER_LENGTH,)
    rows = _rows(module, module.config.get_text_config())
    values = None if rows is None else IdRange(rows)
    ids = _optional(_DECODER_IDS, shape, symbols, values)
    yield replace(ids, optional=False)
    yield _mask("decoder_attention_mask", shape, symbols)


def _of_vision(module: Any, spec: ModelSpec, folder: Path) -> Iterator[InputSpec]:
    """Yield the image inputs of a model, besides its main input."""
    pixels = _pixels(module, replace(spec, item_shape=None), folder)
    if pixels is not None and module.main_input_name == "input_ids":
        yield pixels


def _of_pixels(inputs: Iterable[InputSpec]) -> Iterator[InputSpec]:
    """Yield the mask of the pixels that count, of the height and width of the images."""
    for pixels in inputs:
        if pixels.name == "pixel_values" and len(pixels.shape) == 3:
            mask = _optional("pixel_mask", pixels.shape[1:], (), Mask(of=pixels.name), (0, 1))
            # As with the pixels, running the model shows whether it takes other sizes.
            yield replace(mask, guess=InputGuess(free=True))


def _mask(name: str, shape: tuple[int, ...], symbols: tuple[str, ...]) -> InputSpec:
    return _optional(name, shape, symbols, Mask())


def _optional(
    name: str,
    shape: tuple[int, ...],
    symbols: tuple[str, ...],
    values: IdRange | Mask | Boxes | None,
    free: tuple[int, ...] = (0,),
) -> InputSpec:
    return InputSpec(
        shape,
        free,
        torch.int64,
        (torch.int32,),
        values=values,
        name=name,
        optional=True,
        symbols=symbols,
    )


def _pixels(module: Any, spec: ModelSpec, folder: Path) -> InputSpec | None:
    shape = spec.item_shape or _image_shape(module.config, config_of_folder(folder))
    if shape is None:
        return None
    floating, also = _floating(module)
    is_image = len(shape) == 3
    return InputSpec(
        shape,
        (1, 2) if is_image else (),
        floating,
        also,
        guess=InputGuess(free=True) if is_image else None,
        name="pixel_values",
        video=not is_image,
    )


def preprocess_of(folder: Path, inputs: Iterable[InputSpec]) -> Preprocess | None:
    """Return the preprocessing of the folder's image processor; None if it has none."""
    images = config_of_folder(folder)
    pixels = next((each for each in inputs if each.name == "pixel_values"), None)
    return None if images is None or pixels is None else images.preprocess(pixels.image.shape)


def _ids(module: Any, spec: ModelSpec) -> InputSpec:
    config = module.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or TOKENS
    shape = spec.item_shape or (min(TOKENS, longest),)
    padding = getattr(config, "pad_token_id", None)
    rows = _rows(module, config)
    known = isinstance(padding, int) and rows is not None and 0 <= padding < rows
    ids = None if rows is None else IdRange(rows, int(padding or 0) if known else 0)
    return InputSpec(
        shape, (0,), torch.int64, (torch.int32,), values=ids, name=IDS, symbols=(_LENGTH,)
    )


def _rows(module: Any, config: Any) -> int | None:
    """Return the number of rows of the word table; the configuration may have another number."""
    try:
        table = module.get_input_embeddings()
    except NotImplementedError:  # A model with two towers has no single table.
        table = None
    rows = getattr(table, "num_embeddings", None) if isinstance(table, nn.Module) else None
    return rows if isinstance(rows, int) else getattr(config, "vocab_size", None)


def _image_shape(config: Any, images: ImageConfig | None) -> tuple[int, ...] | None:
    """Return ``(C, H, W)``, or ``(T, C, H, W)`` of a video; None if the size is unknown."""
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
