"""A generic, bounded-by-its-caller batcher: knows neither gRPC nor PyTorch."""

from layertap.batching.batcher import ALONE, Batcher, BatchPolicy
from layertap.batching.queue import BatchQueue, ClosedError

__all__ = ["ALONE", "BatchPolicy", "BatchQueue", "Batcher", "ClosedError"]
