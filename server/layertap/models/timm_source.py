"""Models of timm (``timm:NAME``) with timm's own transforms; needs the extra ``layertap[timm]``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from layertap.errors import ModelLoadError, WeightsUnavailableError
from layertap.models.checkpoint_files import Checkpoint
from layertap.models.image_config import config_of_timm
from layertap.models.loaded import Built
from layertap.models.seeding import seeded
from layertap.models.signature import InputSpec
from layertap.models.stand_ins import StandIn
from layertap.models.weights import (
    DEFAULT,
    RANDOM,
    load_checkpoint,
    random_text,
    read_checkpoint,
)
from layertap.settings import ModelSpec
from layertap.settings.paths import is_path

__all__ = ["build_timm"]

# The arguments of timm's training script that timm.data.resolve_data_config reads.
_IMAGE_ARGUMENTS = (
    *("input_size", "img_size", "in_chans", "mean", "std"),
    *("interpolation", "crop_pct", "crop_mode"),
)


def build_timm(spec: ModelSpec) -> Built:
    """Create a timm model by its name, such as ``timm:convnext_tiny`` or ``timm:vit_base.augreg``.

    With an item shape of one channel, the model is built for one channel, and timm converts weights
    for three channels to it.

    Weights: DEFAULT for timm's own weights of that name, the path of a state dict, or random.

    Raises:
        ModelLoadError: timm is not installed, or has no such model.
        WeightsUnavailableError: The weights can't be found or read.
    """
    timm = _timm()
    name = spec.target
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
        raise ModelLoadError(f"timm has no model {name!r}{hint}")
    module, weights, settings = _weighted(timm, spec)
    try:
        config = timm.data.resolve_data_config(settings, model=module)
    except (AssertionError, TypeError) as error:
        raise ModelLoadError(
            f"timm:{name}: the training arguments in {weights} do not describe its images: {error}"
        ) from error
    shape = spec.item_shape or tuple(config["input_size"])
    fixed = _takes_size(timm, name)
    return Built(
        module=module,
        source=f"timm:{name}",
        weights=weights,
        inputs=(InputSpec(shape, free=() if fixed else (1, 2)),),
        preprocess=config_of_timm(config, "timm's configuration").preprocess(shape),
    )


def _timm() -> Any:
    try:
        # timm is optional and slow to import, so only its own models import it.
        import timm  # noqa: PLC0415
        import timm.data  # noqa: PLC0415
    except ImportError as error:
        raise ModelLoadError(
            "timm is not installed; install it with pip install 'layertap[timm]'"
        ) from error
    return timm


def _weighted(timm: Any, spec: ModelSpec) -> tuple[nn.Module, str, dict[str, Any]]:
    """Return the module, a description of its weights for clients, and image settings.

    A checkpoint of timm's training script holds the script's arguments, from which timm derived the
    image preprocessing of its own evaluation.
    """
    size: dict[str, Any] = {}
    channels = spec.item_shape[0] if spec.item_shape and len(spec.item_shape) == 3 else 3
    if channels != 3:
        size["in_chans"] = channels
    if spec.item_shape is not None and _takes_size(timm, spec.target):
        size["img_size"] = spec.item_shape[-2:]
    if spec.weights == DEFAULT:
        return _pretrained(timm, spec.target, size), "timm's own", {}
    if spec.weights == RANDOM:
        with seeded(spec.seed):
            module = timm.create_model(spec.target, pretrained=False, **size)
        return module, random_text(spec.seed), {}
    if is_path(spec.weights):
        module = timm.create_model(spec.target, pretrained=False, **size)
        checkpoint = read_checkpoint(spec.weights)
        text = load_checkpoint(module, checkpoint, spec.weights_key)
        return module, text, _image_settings(checkpoint)
    raise WeightsUnavailableError(
        f"weights of timm:{spec.target}: got {spec.weights!r}, expected DEFAULT, the path of a "
        f"state dict, or 'random'; timm names its weights in the model, such as 'resnet50.a1_in1k'"
    )


def _image_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    contents = checkpoint.contents
    arguments = contents.get("args") if isinstance(contents, Mapping) else None
    if isinstance(arguments, StandIn):
        arguments = arguments.content
    if not isinstance(arguments, Mapping):
        return {}
    return {name: arguments[name] for name in _IMAGE_ARGUMENTS if arguments.get(name)}


def _takes_size(timm: Any, name: str) -> bool:
    config = timm.get_pretrained_cfg(name)
    return bool(config and config.fixed_input_size)


def _pretrained(timm: Any, name: str, size: dict[str, Any]) -> nn.Module:
    try:
        module: nn.Module = timm.create_model(name, pretrained=True, **size)
    except Exception as error:
        raise WeightsUnavailableError(
            f"weights of timm:{name} can't be downloaded ({type(error).__name__}); check the "
            f"network, or give a state dict with --weights PATH, or 'random'"
        ) from error
    return module
