"""Groups waiting items into batches. Independent of gRPC and PyTorch.

The caller limits how many items wait.
"""

from layertap.batching.batcher import Batcher
from layertap.batching.decision import LEAST_TURNS, MARGIN, MOST_TURNS, sharing_pays
from layertap.batching.queue import BatchQueue, ClosedError
from layertap.settings.batch_policy import ALONE, BatchPolicy

__all__ = [
    "ALONE",
    "LEAST_TURNS",
    "MARGIN",
    "MOST_TURNS",
    "BatchPolicy",
    "BatchQueue",
    "Batcher",
    "ClosedError",
    "sharing_pays",
]
