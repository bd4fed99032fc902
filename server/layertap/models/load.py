"""From a spec to a model that is ready to run."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from layertap.errors import ModelLoadError
from layertap.models.factory_source import build_factory
from layertap.models.input_spec import InputSpec
from layertap.models.loaded import Built, LoadedModel
from layertap.models.preprocess import Preprocess, default_preprocess
from layertap.models.spec import ModelSpec, SourceKind
from layertap.models.timm_source import build_timm
from layertap.models.torchscript_source import build_torchscript
from layertap.models.torchvision_source import build_torchvision

__all__ = ["load_model"]

_log = logging.getLogger(__name__)

MAX_NAMED = 5
"""Modules that a warning names."""

_BUILD: dict[SourceKind, Callable[[ModelSpec], Built]] = {
    SourceKind.TORCHVISION: build_torchvision,
    SourceKind.TORCHSCRIPT: build_torchscript,
    SourceKind.FACTORY: build_factory,
    SourceKind.TIMM: build_timm,
}


def load_model(spec: ModelSpec, device: torch.device | str = "cpu") -> LoadedModel:
    """Build the spec's model, put it into eval mode, drop gradients and move it to the device.

    What of its input is a guess is marked as such in ``input.guess``.

    Raises:
        ModelLoadError: it can't be built, needs several inputs, or can't be put on the device.
        WeightsUnavailableError: its weights can't be had; other weights never take their place.
    """
    # Tensors that are made in inference mode can't be differentiated with ever after, and some
    # models differentiate inside their forward.
    with torch.inference_mode(False), torch.no_grad():
        return _load(spec, device)


def _load(spec: ModelSpec, device: torch.device | str) -> LoadedModel:
    built = _BUILD[spec.kind](spec)
    _check_inputs(spec, built.module)
    module = built.module
    _into_evaluation_mode(module, spec.name)
    # Not module.requires_grad_(): TorchScript modules refuse it.
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    try:
        place = torch.empty(0, device=device).device
        module = _formed(module.to(place), spec)
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
        input=_takes(built.input, spec),
        preprocess=_preprocess(spec, built),
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


def _formed(module: nn.Module, spec: ModelSpec) -> nn.Module:
    if spec.precision:
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


def _check_inputs(spec: ModelSpec, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        method: Any = module.forward
        arguments = method.schema.arguments[1:]
        needed = [a.name for a in arguments if not a.has_default_value() and not a.kwarg_only]
    else:
        needed = [
            parameter.name
            for parameter in inspect.signature(module.forward).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
    if len(needed) > 1:
        raise ModelLoadError(
            f"model {spec.name!r} needs {len(needed)} inputs ({', '.join(needed)}), expected one "
            f"tensor; wrap it in a module whose forward takes one"
        )


def _preprocess(spec: ModelSpec, built: Built) -> Preprocess | None:
    # torchvision says of each of its models how to preprocess, and of some that it takes no images.
    if spec.kind is SourceKind.TORCHVISION:
        return built.preprocess
    return built.preprocess or default_preprocess(built.input)
