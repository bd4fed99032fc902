"""The inputs of a module that does not describe them: declared by the spec, or guessed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from layertap.errors import ModelLoadError
from layertap.models.signature import Boxes, IdRange, InputGuess, InputSpec, Mask
from layertap.settings import DeclaredInput, ModelSpec

__all__ = ["declared_input", "guess_input", "taken_by"]

_IMAGE = (224, 224)

_TRIED = (torch.int64, torch.float32, torch.float64, torch.uint8, torch.bool)
"""The dtypes to try if the model fails with its own floating-point dtype."""


def taken_by(module: nn.Module, spec: ModelSpec) -> tuple[InputSpec, ...]:
    """Return the inputs that a spec declares, or a guess of the first one; see ``guess_input``."""
    if spec.inputs:
        return tuple(map(declared_input, spec.inputs))
    return (guess_input(module, spec),)


def declared_input(declared: DeclaredInput) -> InputSpec:
    """Return an input as it was declared."""
    values: IdRange | Mask | Boxes | None = None
    if declared.mask:
        values = Mask()
    elif declared.ids:
        values = IdRange(declared.ids)
    elif declared.boxes:
        values = Boxes(declared.boxes)
    return InputSpec(
        declared.shape,
        tuple(index for index, _ in declared.symbols),
        getattr(torch, declared.dtype),
        values=values,
        name=declared.name,
        optional=declared.optional,
        symbols=tuple(symbol for _, symbol in declared.symbols),
    )


def guess_input(module: nn.Module, spec: ModelSpec) -> InputSpec:
    """Return what the spec declares about the input, and a guess of the rest.

    The item shape is the declared one, or else an image with the channels of the module's first
    layer. If an embedding comes first, the dtype is guessed to be int64; otherwise it is that of
    the first floating-point parameter or buffer. All sizes after the first one (channels, features)
    are guessed to be free. Guesses are marked as such: ``layertap.extraction.trial`` tests them.

    Raises:
        ModelLoadError: The spec declares no item shape and the module's first layer is not a 2-D
            convolution, or the spec's free dimensions are not dimensions of the item.
    """
    first = _first_layer(module)
    kind = "" if first is None else _kind(first)
    shape = spec.item_shape
    if shape is None:
        if first is None or kind != "Conv2d":
            raise ModelLoadError(
                f"item shape of {spec.name}: it can't be derived from the model; give the sizes of "
                "one item without the batch, such as --item-shape 3,224,224"
            )
        shape = (_in_channels(first), *_IMAGE)
    floating = _float_dtype(module)
    dtype = torch.int64 if kind == "Embedding" else floating
    others = tuple(other for other in dict.fromkeys((floating, *_TRIED)) if other is not dtype)
    declared = spec.input_dtype
    return InputSpec(
        shape,
        _free(spec, shape),
        getattr(torch, declared) if declared else dtype,
        guess=InputGuess(() if declared else others, spec.free_dims is None),
    )


def _free(spec: ModelSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    if spec.free_dims is None:
        return tuple(range(1, len(shape)))
    if max(spec.free_dims, default=0) >= len(shape):
        raise ModelLoadError(
            f"free dimensions of {spec.name}: got {list(spec.free_dims)}, expected indices into "
            f"the item shape {list(shape)}: 0 to {len(shape) - 1}"
        )
    return spec.free_dims


def _first_layer(module: nn.Module) -> nn.Module | None:
    for part in module.modules():
        if any(True for _ in part.parameters(recurse=False)):
            return part
    return None


def _kind(module: nn.Module) -> str:
    # A scripted module's Python type is RecursiveScriptModule; this is the class it was made from.
    return str(getattr(module, "original_name", type(module).__name__))


def _in_channels(convolution: Any) -> int:
    # The weight is [out channels, in channels per group, kernel H, kernel W]. In a traced file
    # nothing else shows the number of channels.
    return int(convolution.weight.shape[1]) * int(getattr(convolution, "groups", 1))


def _float_dtype(module: nn.Module) -> torch.dtype:
    for values in (module.parameters(), module.buffers()):
        for tensor in values:
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32
