"""Model sources: build a module from a spec, in evaluation mode on a device, with its inputs."""

from __future__ import annotations

from layertap.models.compiler_import import import_torchvision

import_torchvision()  # Before any other file imports it.

from layertap.models.batch import Batch, BatchKey, ItemTensor
from layertap.models.free_sizes import free_sizes, resized
from layertap.models.image_batch import ImageBatch
from layertap.models.images import ImageLimits, decode_image
from layertap.models.load import load_model
from layertap.models.loaded import LoadedModel
from layertap.models.preprocess import Preprocess
from layertap.models.signature import Boxes, IdRange, InputGuess, InputSpec, Mask, Signature, Tower
from layertap.models.steps import Steps
from layertap.settings import INPUT_DTYPES, ImageSettings, ModelSpec, SourceKind

__all__ = [
    "INPUT_DTYPES",
    "Batch",
    "BatchKey",
    "Boxes",
    "IdRange",
    "ImageBatch",
    "ImageLimits",
    "ImageSettings",
    "InputGuess",
    "InputSpec",
    "ItemTensor",
    "LoadedModel",
    "Mask",
    "ModelSpec",
    "Preprocess",
    "Signature",
    "SourceKind",
    "Steps",
    "Tower",
    "decode_image",
    "free_sizes",
    "load_model",
    "resized",
]
