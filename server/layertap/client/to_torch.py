"""Views as torch tensors. The only module of the client that imports torch."""

from __future__ import annotations

import torch

from layertap.silence import warnings_ignored
from layertap.wire.tensors import TensorView

__all__ = ["to_torch"]

with warnings_ignored():
    # torch warns once per process that it can't protect read-only memory from being written to. The
    # message belongs to the caller alone, so this triggers the warning once, where it is ignored.
    torch.frombuffer(memoryview(b"\0"), dtype=torch.uint8)


def to_torch(view: TensorView) -> torch.Tensor:
    """Return a tensor ``view.shape`` of ``view.dtype`` that shares the view's memory."""
    dtype = getattr(torch, view.dtype.name)
    if not len(view.data):
        return torch.empty(view.shape, dtype=dtype)
    # torch knows no read-only memory, and a write to what is mapped for reading ends the process.
    data = view.data if view.remap is None else view.remap()
    return torch.frombuffer(data, dtype=dtype).reshape(view.shape)
