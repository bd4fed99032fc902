"""Detects out-of-memory errors."""

from __future__ import annotations

import torch

__all__ = ["is_out_of_memory"]

# What PyTorch's allocator for the CPU raises is a plain RuntimeError.
_OF_THE_CPU = "DefaultCPUAllocator: can't allocate memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is one that may be gone when less is going on."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _OF_THE_CPU in str(error)
