"""Models saved by ``torch.jit.save``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from layertap.errors import ModelLoadError, WeightsUnavailableError
from layertap.models.guessed_input import taken_by
from layertap.models.loaded import Built
from layertap.models.weights import DEFAULT, RANDOM
from layertap.settings import ModelSpec
from layertap.silence import warnings_ignored

__all__ = ["build_torchscript"]


def build_torchscript(spec: ModelSpec) -> Built:
    """Load a TorchScript file onto the CPU.

    Raises:
        ModelLoadError: There is no such file, it is not a TorchScript archive, or its input shape
            can't be determined.
        WeightsUnavailableError: The spec requests other weights than the file's.
    """
    path = Path(spec.target)
    _refuse_weights(path.name, spec.weights)
    module = _load(path)
    return Built(
        module=module,
        source=f"torchscript:{path.name}",
        weights=path.name,
        inputs=taken_by(module, spec),
        more=not spec.inputs,
    )


def _refuse_weights(name: str, weights: str) -> None:
    if weights == DEFAULT:
        return
    why = (
        "random weights make no sense for it, since the file holds no code that initialises them"
        if weights == RANDOM
        else f"it can't take {weights!r}"
    )
    raise WeightsUnavailableError(
        f"weights of {name}: a TorchScript file has its own weights, and {why}; leave --weights out"
    )


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ModelLoadError(f"TorchScript file {path}: no such file")
    try:
        with warnings_ignored():  # torch.jit is deprecated; files that it saved are still in use.
            return torch.jit.load(path, map_location="cpu")
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelLoadError(
            f"TorchScript file {path}: torch can't load it as one. For a state dict, name a "
            f"builder or a factory as the model and this file as its --weights. A whole model of "
            f"torch.save or a program of torch.export is loaded by a factory of yours, such as "
            f"torch.export.unflatten(torch.export.load(FILE))"
        ) from error
