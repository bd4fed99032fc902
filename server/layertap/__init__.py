"""layertap: a gRPC feature server for PyTorch models.

Name layers of a model, get their activations: ``Client`` asks a server, which ``layertap serve``
starts. Importing this package does not import torch.
"""

from importlib.metadata import version

from layertap.client import Client, Features, FeatureStream, StreamRequest
from layertap.errors import LayertapError
from layertap.selection import Capture, Extractor, LayerSelection, Reduction
from layertap.wire.memory import keep_memory

__all__ = [
    "Capture",
    "Client",
    "Extractor",
    "FeatureStream",
    "Features",
    "LayerSelection",
    "LayertapError",
    "Reduction",
    "StreamRequest",
    "__version__",
    "keep_memory",
]

__version__ = version("layertap")
