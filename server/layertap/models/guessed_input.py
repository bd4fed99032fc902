"""The input of a module that comes with no description of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from layertap.errors import ModelLoadError
from layertap.models.input_spec import InputSpec
from layertap.models.spec import ModelSpec

__all__ = ["guess_input"]

_IMAGE = (224, 224)


def guess_input(module: nn.Module, spec: ModelSpec) -> InputSpec:
    """Return the spec's item shape, or images with the channels of the module's first layer.

    The sizes after the first (channels, features) may vary. Token models (an embedding first) take
    int64, others the type of their first floating-point parameter.

    Raises:
        ModelLoadError: the spec has no item shape and the module's first layer is no 2-D
            convolution.
    """
    first = _first_layer(module)
    kind = "" if first is None else _kind(first)
    shape = spec.item_shape
    if shape is None:
        if first is None or kind != "Conv2d":
            raise ModelLoadError(
                f"item shape of {spec.name}: it can't be told from the model; give the sizes of "
                "one item without the batch, such as --item-shape 3,224,224"
            )
        shape = (_in_channels(first), *_IMAGE)
    dtype = torch.int64 if kind == "Embedding" else _float_dtype(module)
    return InputSpec(shape, spatial=min(3, len(shape) - 1), dtype=dtype)


def _first_layer(module: nn.Module) -> nn.Module | None:
    for part in module.modules():
        if any(True for _ in part.parameters(recurse=False)):
            return part
    return None


def _kind(module: nn.Module) -> str:
    # A scripted module's Python type is RecursiveScriptModule; this is what it was scripted from.
    return str(getattr(module, "original_name", type(module).__name__))


def _in_channels(convolution: Any) -> int:
    # The weight is [out channels, in channels a group, kernel H, kernel W]; in a traced file it is
    # all that tells the channels.
    return int(convolution.weight.shape[1]) * int(getattr(convolution, "groups", 1))


def _float_dtype(module: nn.Module) -> torch.dtype:
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32
