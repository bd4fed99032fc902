"""Loads a model from its spec."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from layertap.errors import ModelLoadError
from layertap.models.checkpoint_files import config_folder
from layertap.models.factory_source import build_factory
from layertap.models.hf_source import build_hugging_face
from layertap.models.image_config import ImageConfig, config_of_folder
from layertap.models.loaded import Built, LoadedModel
from layertap.models.preprocess import choose_preprocess
from layertap.models.signature import DEFAULT_NAME, InputSpec, Signature
from layertap.models.timm_source import build_timm
from layertap.models.torchscript_source import build_torchscript
from layertap.models.torchvision_source import build_torchvision
from layertap.settings import ModelSpec, SourceKind

__all__ = ["load_model"]

_log = logging.getLogger(__name__)

MAX_NAMED = 5
"""Modules that a warning names."""

_BUILD: dict[SourceKind, Callable[[ModelSpec], Built]] = {
    SourceKind.TORCHVISION: build_torchvision,
    SourceKind.TORCHSCRIPT: build_torchscript,
    SourceKind.FACTORY: build_factory,
    SourceKind.TIMM: build_timm,
    SourceKind.HF: build_hugging_face,
    SourceKind.HF_CONFIG: build_hugging_face,
}


def load_model(spec: ModelSpec, device: torch.device | str = "cpu") -> LoadedModel:
    """Build the spec's model, put it into eval mode, drop gradients and move it to the device.

    What of its input is a guess is marked as such in its ``guess``.

    Raises:
        ConfigError: The spec's image settings don't fit the model.
        ModelLoadError: it can't be built, needs several inputs, or can't be put on the device.
        WeightsUnavailableError: its weights can't be had; other weights never take their place.
    """
    # Tensors that are made in inference mode can't be differentiated with ever after, and some
    # models differentiate inside their forward.
    with torch.inference_mode(False), torch.no_grad():
        return _load(spec, device)


def _load(spec: ModelSpec, device: torch.device | str) -> LoadedModel:
    config = _beside_weights(spec.weights)
    if config is not None and config.shape is not None and spec.item_shape is None:
        spec = replace(spec, item_shape=config.shape)
    built = _with_images(_BUILD[spec.kind](spec), spec, config)
    module = built.module
    takes = replace(_takes(built.input, spec), name=_input_name(spec, module))
    _into_evaluation_mode(module, spec.name)
    # Not module.requires_grad_(): TorchScript modules refuse it.
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    try:
        place = torch.empty(0, device=device).device
        module = _formed(module.to(place), spec, converted=built.in_precision)
    # Without CUDA torch asserts, or raises at its first use; a wrong name is a RuntimeError.
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelLoadError(f"device {device} for model {spec.name}: {reason}") from error
    return LoadedModel(
        name=spec.name,
        source=built.source,
        weights=built.weights,
        module=module,
        device=place,
        signature=Signature((takes,)),
        preprocess=built.preprocess,
        takes_list=built.takes_list,
    )


def _into_evaluation_mode(module: nn.Module, name: str) -> None:
    """Put every submodule into evaluation mode, also where a model's own ``train`` leaves some out.

    A dropout that stays on would make answers random, and a batch norm that does would make them
    depend on the other items of the batch.
    """
    module.eval()
    left = [
        (path or "the model itself", part)
        for path, part in module.named_modules()
        if part.training and not isinstance(part, torch.jit.ScriptModule)
    ]
    for _, part in left:
        vars(part)["training"] = False
    if left:
        _log.warning(
            "model %s: its own eval() left %s in training mode; layertap serves every module in "
            "evaluation mode", name, ", ".join(path for path, _ in left[:MAX_NAMED]),
        )  # fmt: skip


def _formed(module: nn.Module, spec: ModelSpec, *, converted: bool) -> nn.Module:
    if spec.precision and not converted:
        module = module.to(getattr(torch, spec.precision))
    if spec.channels_last:
        # The weights' layout is enough: a convolution's output takes it, and so on to the end.
        module = module.to(memory_format=torch.channels_last)
    return module


def _takes(takes: InputSpec, spec: ModelSpec) -> InputSpec:
    """Return what the model takes in its precision; float32 is converted, as numpy lacks others."""
    if not spec.precision or not takes.dtype.is_floating_point:
        return takes
    own: torch.dtype = getattr(torch, spec.precision)
    also = () if own is torch.float32 else (torch.float32,)
    return replace(takes, dtype=own, also=also)


def _input_name(spec: ModelSpec, module: nn.Module) -> str:
    """Return the name of the only argument that a module's ``forward`` needs, or of its first one.

    Raises:
        ModelLoadError: If it needs several.
    """
    if isinstance(module, torch.jit.ScriptModule):
        method: Any = module.forward
        arguments = method.schema.arguments[1:]
        names = [a.name for a in arguments if not a.kwarg_only]
        needed = [a.name for a in arguments if not a.has_default_value() and not a.kwarg_only]
    else:
        taken = [
            parameter
            for parameter in inspect.signature(module.forward).parameters.values()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        names = [parameter.name for parameter in taken]
        needed = [parameter.name for parameter in taken if parameter.default is parameter.empty]
    if len(needed) > 1:
        raise ModelLoadError(
            f"model {spec.name!r} needs {len(needed)} inputs ({', '.join(needed)}), expected one "
            f"tensor; wrap it in a module whose forward takes one"
        )
    return names[0] if names else DEFAULT_NAME


def _beside_weights(weights: str) -> ImageConfig | None:
    """Return the image settings in a checkpoint's configuration file; None if there are none."""
    folder = config_folder(weights)
    return None if folder is None else config_of_folder(folder)


def _with_images(built: Built, spec: ModelSpec, config: ImageConfig | None) -> Built:
    """Return the built model with its image preprocessing, and the item that this makes.

    What the spec says wins over the model's code, that over the configuration next to the weights,
    and that over what the source knows of the model.
    """
    takes, known = built.input, built.preprocess
    if config is not None and not built.preprocess_is_code:
        known = config.preprocess(takes.shape) or known
    crop = spec.images.crop
    if crop and spec.item_shape is None and takes.free == (1, 2) and len(takes.shape) == 3:
        # The layers are measured at the size that images have.
        takes = replace(takes, shape=(takes.shape[0], crop[0], crop[-1]))
    return replace(
        built, input=takes, preprocess=choose_preprocess(known, spec.images, takes, spec.name)
    )
