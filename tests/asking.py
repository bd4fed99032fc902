"""Sends requests to an engine in the same process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from layertap import Extractor, Features, LayerSelection
from layertap.engine import Call, Engine, ExtractionRequest, Inputs
from layertap.services.native_form import NativeForm
from layertap.wire.dtypes import of_array
from layertap.wire.tensors import TensorView

Given = np.ndarray | torch.Tensor | Mapping[str, torch.Tensor]
"""The batch of a model's only input, or a tensor for each input by name."""


def request_for(
    net: str,
    layers: str | Sequence[str | LayerSelection],
    x: Given,
    extractor: Extractor = Extractor.AUTO,
) -> ExtractionRequest:
    """Return the request for layers of a batch, given as selections or command-line texts."""
    named = x if isinstance(x, Mapping) else {"": x}
    views = tuple(_view(name, value) for name, value in named.items())
    texts = [layers] if isinstance(layers, str) else layers
    selections = tuple(
        text if isinstance(text, LayerSelection) else LayerSelection.parse(text) for text in texts
    )
    return ExtractionRequest(net, Inputs(views), selections, extractor, form=NativeForm)


def ask(
    engine: Engine,
    net: str,
    layers: str | Sequence[str | LayerSelection],
    x: Given,
    extractor: Extractor = Extractor.AUTO,
    *,
    variant: str = "",
) -> Features:
    """Extract, and read the message like a client."""
    request = replace(request_for(net, layers, x, extractor), variant=variant)
    return Features(engine.extract(request, Call()).payload)


def _view(name: str, value: np.ndarray | torch.Tensor) -> TensorView:
    array = value.numpy() if isinstance(value, torch.Tensor) else value
    return TensorView(name, of_array(array), array.shape, memoryview(array.tobytes()))
