"""Model sources: from a spec to an eval-mode module on a device, and what it takes."""

from __future__ import annotations

from layertap.models.images import ImageLimits, decode_image
from layertap.models.input_spec import InputSpec
from layertap.models.load import load_model
from layertap.models.loaded import LoadedModel
from layertap.models.preprocess import Preprocess
from layertap.models.spec import ModelSpec, SourceKind

__all__ = [
    "ImageLimits",
    "InputSpec",
    "LoadedModel",
    "ModelSpec",
    "Preprocess",
    "SourceKind",
    "decode_image",
    "load_model",
]
