"""Detects out-of-memory errors."""

from __future__ import annotations

import torch

__all__ = ["is_out_of_memory"]

# PyTorch's CPU allocator raises a plain RuntimeError with this message.
_OF_THE_CPU = "DefaultCPUAllocator: can't allocate memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, so that the same work may succeed when less is running."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _OF_THE_CPU in str(error)
