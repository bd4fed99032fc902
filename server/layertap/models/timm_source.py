"""Models of timm: ``timm:NAME``, with timm's own transforms. Needs the extra ``layertap[timm]``."""

from __future__ import annotations

import difflib
from pathlib import PurePath
from typing import Any

from torch import nn

from layertap.errors import ModelLoadError, WeightsUnavailableError
from layertap.models.image_config import config_of_timm
from layertap.models.input_spec import InputSpec
from layertap.models.loaded import Built
from layertap.models.seeding import seeded
from layertap.models.spec import ModelSpec
from layertap.models.weights import (
    DEFAULT,
    RANDOM,
    is_path,
    load_into,
    random_text,
    read_state_dict,
)

__all__ = ["build_timm"]


def build_timm(spec: ModelSpec) -> Built:
    """Create a timm model by its name, such as ``timm:convnext_tiny`` or ``timm:vit_base.augreg``.

    Weights: DEFAULT for those that timm's name stands for, the path of a state dict, or random.

    Raises:
        ModelLoadError: timm is not installed, or has no such model.
        WeightsUnavailableError: the weights can't be had.
    """
    timm = _timm()
    name = spec.target
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
        raise ModelLoadError(f"timm has no model {name!r}{hint}")
    module, weights = _weighted(timm, spec)
    config = timm.data.resolve_data_config({}, model=module)
    shape = spec.item_shape or tuple(config["input_size"])
    fixed = _takes_size(timm, name)
    return Built(
        module=module,
        source=f"timm:{name}",
        weights=weights,
        input=InputSpec(shape, free=() if fixed else (1, 2)),
        preprocess=config_of_timm(config, "timm's configuration").preprocess(shape),
    )


def _timm() -> Any:
    try:
        # Optional, and slow to import: only a model of its own pays for it.
        import timm  # noqa: PLC0415
        import timm.data  # noqa: PLC0415
    except ImportError as error:
        raise ModelLoadError(
            "timm is not installed; install it with pip install 'layertap[timm]'"
        ) from error
    return timm


def _weighted(timm: Any, spec: ModelSpec) -> tuple[nn.Module, str]:
    size = {}
    if spec.item_shape is not None and _takes_size(timm, spec.target):
        size["img_size"] = spec.item_shape[-2:]
    if spec.weights == DEFAULT:
        return _pretrained(timm, spec.target, size), "timm's own"
    if spec.weights == RANDOM:
        with seeded(spec.seed):
            return timm.create_model(spec.target, pretrained=False, **size), random_text(spec.seed)
    if is_path(spec.weights):
        module = timm.create_model(spec.target, pretrained=False, **size)
        text = PurePath(spec.weights).name
        load_into(module, read_state_dict(spec.weights), text)
        return module, text
    raise WeightsUnavailableError(
        f"weights of timm:{spec.target}: got {spec.weights!r}, expected DEFAULT, the path of a "
        f"state dict, or 'random'; timm names its weights in the model, such as 'resnet50.a1_in1k'"
    )


def _takes_size(timm: Any, name: str) -> bool:
    config = timm.get_pretrained_cfg(name)
    return bool(config and config.fixed_input_size)


def _pretrained(timm: Any, name: str, size: dict[str, Any]) -> nn.Module:
    try:
        module: nn.Module = timm.create_model(name, pretrained=True, **size)
    except Exception as error:
        raise WeightsUnavailableError(
            f"weights of timm:{name} can't be had ({type(error).__name__}); connect this machine, "
            f"or give a state dict with --weights PATH, or 'random'"
        ) from error
    return module
