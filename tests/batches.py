"""Batches and keys for models with one input, from plain tensors and shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layertap.extraction import Plan
from layertap.models import Batch, BatchKey, ImageBatch, ItemTensor, LoadedModel, Preprocess


def batch_for(of: LoadedModel | Plan, x: torch.Tensor) -> Batch:
    """Return the batch of one tensor that a model or a plan takes."""
    key = of.signature.key if isinstance(of, LoadedModel) else of.batch_key
    return Batch({key.main.name: x})


def key_for(model: LoadedModel, shape: Sequence[int]) -> BatchKey:
    """Return the key of batches whose items have a shape."""
    key = model.signature.key
    return key.with_shape(key.main.name, shape)


def key_of_shape(shape: Sequence[int]) -> BatchKey:
    """Return the key of float32 batches of some model's input ``x``."""
    return BatchKey((ItemTensor("x", tuple(shape), torch.float32),))


def images_for(preprocess: Preprocess, *files: bytes) -> torch.Tensor:
    """Return the batch ``[B, C, H, W]`` of image files."""
    batch = ImageBatch(preprocess, len(files))
    for index, data in enumerate(files):
        batch.decode(index, data)
    return batch.tensor()
