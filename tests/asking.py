"""Sends requests to an engine in the same process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from layertap import Extractor, Features, LayerSelection
from layertap.engine import Call, Engine, ExtractionRequest, Inputs
from layertap.services.native_form import NativeForm
from layertap.wire.dtypes import of_array
from layertap.wire.tensors import TensorView


def request_for(
    net: str,
    layers: str | Sequence[str | LayerSelection],
    x: np.ndarray | torch.Tensor,
    extractor: Extractor = Extractor.AUTO,
) -> ExtractionRequest:
    """Return the request for layers of a batch, given as selections or command-line texts."""
    array = x.numpy() if isinstance(x, torch.Tensor) else x
    view = TensorView("", of_array(array), array.shape, memoryview(array.tobytes()))
    texts = [layers] if isinstance(layers, str) else layers
    selections = tuple(
        text if isinstance(text, LayerSelection) else LayerSelection.parse(text) for text in texts
    )
    return ExtractionRequest(net, Inputs((view,)), selections, extractor, form=NativeForm)


def ask(
    engine: Engine,
    net: str,
    layers: str | Sequence[str | LayerSelection],
    x: np.ndarray | torch.Tensor,
    extractor: Extractor = Extractor.AUTO,
) -> Features:
    """Extract, and read the message like a client."""
    return Features(engine.extract(request_for(net, layers, x, extractor), Call()).payload)
