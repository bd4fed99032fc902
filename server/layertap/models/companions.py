"""The inputs that a module takes beside its first one, guessed from its ``forward``.

Note [Companions]
    The parameters of ``forward`` show which arguments exist, but not which of them are tensors, nor
    their dtypes and shapes. A parameter without a default must be given, so it is an input. One
    that defaults to None is an input if its name is a common one, such as ``attention_mask``. All
    other arguments are never given, and the model's notes say so. Dtypes and shapes are guessed,
    and ``layertap.extraction.trial`` runs the model to find the right guess. Users can declare the
    inputs instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from layertap.errors import ModelLoadError
from layertap.models.arguments import Parameter, ParameterKind
from layertap.models.signature import IdRange, InputGuess, InputSpec, Mask

__all__ = ["companions", "needs_declaring"]

_IMAGE = (3, 224, 224)
_STEPS = 1000
"""Number of steps of a diffusion model, if the model's own number is not known."""

_HOW = (
    "declare its inputs in the configuration, as docs/inputs.md describes, or wrap the model in a "
    "module whose forward takes tensors"
)


def companions(
    model: str, parameters: Iterable[Parameter], first: InputSpec
) -> Iterator[InputSpec]:
    """Yield a guess at each input beside the first one; see Note [Companions].

    Args:
        model: The model's name, for messages.
        parameters: The parameters of its ``forward`` except the first one.
        first: The first input.

    Raises:
        ModelLoadError: A required argument is not a tensor.
    """
    for parameter in parameters:
        if parameter.kind is ParameterKind.REST:
            continue
        if parameter.constant and parameter.required:
            raise ModelLoadError(
                f"model {model!r}: its forward needs {parameter.name!r}, which is not a "
                f"tensor; wrap the model in a module that passes it"
            )
        guess = None if parameter.constant else _conventional(parameter.name, first)
        if parameter.required:
            yield guess or _like(parameter.name, first)
        elif guess is not None and parameter.none:
            yield replace(
                guess,
                optional=True,
                guess=replace(guess.guess or InputGuess(free=True), uncertain=True),
            )


def _conventional(name: str, first: InputSpec) -> InputSpec | None:
    """Return the input that usually has this name; None if the name is not a common one."""
    if re.fullmatch(r"pixel_values|images?|img|pixels", name):
        return _guessed(InputSpec(_IMAGE, (1, 2), name=name), shapes=[first.shape])
    if re.fullmatch(r"timesteps?", name):
        steps = InputSpec((), dtype=torch.int64, values=IdRange(_STEPS), name=name)
        return _guessed(steps, dtypes=[torch.float32])
    beside_sequence = name.endswith(("mask", "_ids")) and len(first.shape) in (1, 2)
    return _beside_sequence(name, first.shape[:1]) if beside_sequence else None


def _beside_sequence(name: str, length: tuple[int, ...]) -> InputSpec:
    """Return the input for a name that ends in ``mask`` or ``_ids``, next to a sequence."""
    ids = InputSpec(length, dtype=torch.int64, name=name)
    if name.endswith("mask"):
        mask = replace(ids, values=Mask(padding=1 if "padding" in name else 0))
        return _guessed(mask, dtypes=[torch.bool, torch.float32])
    if re.fullmatch(r"(token_type|segment)_ids", name):
        return _guessed(replace(ids, values=IdRange(2)))
    return _guessed(replace(ids, values=IdRange(*length)) if name == "position_ids" else ids)


def _like(name: str, first: InputSpec) -> InputSpec:
    """Return a guess for an input of which only the name is known: it is like the first one."""
    types = [torch.float32, torch.int64, torch.bool]
    others = [dtype for dtype in types if dtype is not first.dtype]
    shapes = list(dict.fromkeys(shape for shape in (first.shape[:1], ()) if shape != first.shape))
    return _guessed(InputSpec(first.shape, (), first.dtype, name=name), others, shapes)


def _guessed(
    spec: InputSpec,
    dtypes: Iterable[torch.dtype] = (),
    shapes: Iterable[tuple[int, ...]] = (),
) -> InputSpec:
    others = tuple(shape for shape in shapes if shape != spec.shape)
    return replace(spec, guess=InputGuess(tuple(dtypes), free=True, shapes=others))


def needs_declaring(model: str, names: Iterable[str], reason: str) -> ModelLoadError:
    """Return the error for a model whose inputs could not be guessed."""
    return ModelLoadError(
        f"model {model!r} takes {', '.join(names)}, and fails on random tensors for these: "
        f"{reason}; {_HOW}"
    )
