"""The towers of a transformers model, such as the text and the image encoder of CLIP."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from layertap.models.signature import InputSpec, Tower

__all__ = ["towers_of"]

_METHODS = ("get_text_features", "get_image_features", "get_audio_features")
"""The methods of transformers that run a part of a model by itself."""


def towers_of(module: Any, inputs: Sequence[InputSpec]) -> tuple[Tower, ...]:
    """Return the towers of a model; empty if it has none, or if they share inputs.

    Measuring the model finds out whether a layer has the same value when its tower runs alone.

    Args:
        module: The model.
        inputs: Its inputs.
    """
    towers = []
    for method in filter(lambda name: hasattr(module, name), _METHODS):
        taken = inspect.signature(getattr(module, method)).parameters
        own = tuple(spec.name for spec in inputs if spec.name in taken)
        if any(not spec.optional for spec in inputs if spec.name in own):
            towers.append(Tower(own, method))
    names = [name for tower in towers for name in tower.inputs]
    shared = len(set(names)) < len(names)
    whole = all(spec.optional or spec.name in names for spec in inputs)
    return tuple(towers) if len(towers) > 1 and whole and not shared else ()
