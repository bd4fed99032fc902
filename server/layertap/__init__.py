"""layertap: layers of PyTorch models, in this process or from a gRPC server.

Name layers of a model and get their activations: ``load`` runs a model in this process, ``Client``
calls a server, which ``layertap serve`` starts. Importing this package imports neither torch nor
grpc; the first use of a name imports what that name needs.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layertap.audio import Audio
    from layertap.client import (
        AsyncClient,
        AsyncFeatureStream,
        Client,
        Features,
        FeatureStream,
        StreamRequest,
        Tls,
        read_token,
    )
    from layertap.errors import LayertapError
    from layertap.intervention import Axis, Intervention, Operation, Span
    from layertap.local import LocalFeatures, LocalModel, load
    from layertap.malloc import keep_memory
    from layertap.objective import Measure, Objective, ObjectiveTerm
    from layertap.projection import Projection
    from layertap.regrid import Regrid, Resize
    from layertap.selection import (
        Capture,
        Extractor,
        IntegrationRule,
        LayerSelection,
        MapForm,
        Method,
        Reduction,
        Sweep,
    )
    from layertap.settings import Limits
    from layertap.texts import Texts

__all__ = [
    "AsyncClient",
    "AsyncFeatureStream",
    "Audio",
    "Axis",
    "Capture",
    "Client",
    "Extractor",
    "FeatureStream",
    "Features",
    "IntegrationRule",
    "Intervention",
    "LayerSelection",
    "LayertapError",
    "Limits",
    "LocalFeatures",
    "LocalModel",
    "MapForm",
    "Measure",
    "Method",
    "Objective",
    "ObjectiveTerm",
    "Operation",
    "Projection",
    "Reduction",
    "Regrid",
    "Resize",
    "Span",
    "StreamRequest",
    "Sweep",
    "Texts",
    "Tls",
    "__version__",
    "keep_memory",
    "load",
    "read_token",
]

__version__ = version("layertap")

_HOMES = {
    "layertap.audio": ("Audio",),
    "layertap.client": (
        "AsyncClient",
        "AsyncFeatureStream",
        "Client",
        "FeatureStream",
        "Features",
        "StreamRequest",
        "Tls",
        "read_token",
    ),
    "layertap.errors": ("LayertapError",),
    "layertap.intervention": ("Axis", "Intervention", "Operation", "Span"),
    "layertap.local": ("LocalFeatures", "LocalModel", "load"),
    "layertap.malloc": ("keep_memory",),
    "layertap.objective": ("Measure", "Objective", "ObjectiveTerm"),
    "layertap.projection": ("Projection",),
    "layertap.regrid": ("Regrid", "Resize"),
    "layertap.selection": (
        "Capture",
        "Extractor",
        "IntegrationRule",
        "LayerSelection",
        "MapForm",
        "Method",
        "Reduction",
        "Sweep",
    ),
    "layertap.settings": ("Limits",),
    "layertap.texts": ("Texts",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used.

    Raises:
        AttributeError: If the name is not public.
        ModuleNotFoundError: If a package that the name needs is not installed.
    """
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(home)
    except ModuleNotFoundError as error:
        if home != "layertap.local" or (error.name or "").startswith("layertap"):
            raise
        raise ModuleNotFoundError(
            f"layertap.{name} is for models in this process, which need {error.name}; install it "
            f"with: pip install 'layertap[server]'",
            name=error.name,
        ) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the module's names, including those that are not imported yet."""
    return sorted({*globals(), *__all__})
