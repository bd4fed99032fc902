"""Asking an engine in the same process for layers of several inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from layertap import Extractor, LayerSelection
from layertap.client.features import Features
from layertap.engine import Call, Engine, ExtractionRequest, Inputs
from layertap.services.native_form import NativeForm
from layertap.wire.dtypes import of_array
from layertap.wire.tensors import TensorView


def ask_named(
    engine: Engine,
    net: str,
    batch: Mapping[str, torch.Tensor],
    layer: str,
    extractor: Extractor = Extractor.AUTO,
) -> np.ndarray:
    """Return a layer of a batch of named tensors."""
    views = tuple(
        TensorView(name, of_array(array := tensor.numpy()), array.shape,
                   memoryview(array.tobytes()))
        for name, tensor in batch.items()
    )  # fmt: skip
    request = ExtractionRequest(
        net, Inputs(views), (LayerSelection(layer),), extractor, form=NativeForm
    )
    return np.array(Features(engine.extract(request, Call()).payload)[layer])
