"""layertap: a gRPC feature server for PyTorch models.

Name layers of a model, get their activations: ``Client`` asks a server, which ``layertap serve``
starts. Importing this package does not import torch.
"""

from importlib.metadata import version

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
from layertap.malloc import keep_memory
from layertap.selection import Capture, Extractor, LayerSelection, Reduction

__all__ = [
    "AsyncClient",
    "AsyncFeatureStream",
    "Capture",
    "Client",
    "Extractor",
    "FeatureStream",
    "Features",
    "LayerSelection",
    "LayertapError",
    "Reduction",
    "StreamRequest",
    "Tls",
    "__version__",
    "keep_memory",
    "read_token",
]

__version__ = version("layertap")
