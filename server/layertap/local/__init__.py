"""Models in this process: the engine of the server without a server, tensors instead of messages.

``load`` gives a `LocalModel`, whose ``extract`` gives `LocalFeatures`.
"""

from layertap.local.features import LocalFeatures
from layertap.local.loading import load
from layertap.local.model import LocalModel

__all__ = ["LocalFeatures", "LocalModel", "load"]
