"""Models in this process: the server's engine, used directly, with tensors instead of messages.

``load`` returns a `LocalModel`, whose ``extract`` returns `LocalFeatures`.
"""

from layertap.local.features import LocalFeatures
from layertap.local.loading import load
from layertap.local.model import LocalModel

__all__ = ["LocalFeatures", "LocalModel", "load"]
