"""Groups waiting items into batches. Independent of gRPC and PyTorch.

The caller limits how many items wait.
"""

from layertap.batching.batcher import Batcher
from layertap.batching.queue import BatchQueue, ClosedError
from layertap.settings.batch_policy import ALONE, BatchPolicy

__all__ = [
    "ALONE",
    "BatchPolicy",
    "BatchQueue",
    "Batcher",
    "ClosedError",
]
