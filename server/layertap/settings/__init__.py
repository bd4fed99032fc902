"""Every setting of layertap, each declared once. Free of PyTorch.

``definition.py`` defines how a setting is declared. The other files have the declarations:
``server.py`` for ``[server]``, ``limits.py`` for ``[limits]``, and ``served_model.py``,
``model_spec.py``, ``declared_input.py`` and ``image_settings.py`` for ``[[models]]``.
"""

from layertap.settings.batch_policy import ALONE, BatchPolicy
from layertap.settings.declared_input import INPUT_DTYPES, DeclaredInput
from layertap.settings.definition import Definition, Setting, build, definitions, replaced
from layertap.settings.image_settings import Color, ImageSettings
from layertap.settings.limits import Limits
from layertap.settings.model_spec import PRECISIONS, ModelSpec, SourceKind
from layertap.settings.served_model import HostOptions, ServedModel
from layertap.settings.server import (
    METRICS_OFF,
    LogFormat,
    LogLevel,
    SecretFiles,
    ServerOptions,
)

__all__ = [
    "ALONE",
    "INPUT_DTYPES",
    "METRICS_OFF",
    "PRECISIONS",
    "BatchPolicy",
    "Color",
    "DeclaredInput",
    "Definition",
    "HostOptions",
    "ImageSettings",
    "Limits",
    "LogFormat",
    "LogLevel",
    "ModelSpec",
    "SecretFiles",
    "ServedModel",
    "ServerOptions",
    "Setting",
    "SourceKind",
    "build",
    "definitions",
    "replaced",
]
