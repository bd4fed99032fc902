"""Converts views to torch tensors. Of the client's modules, only this one imports torch."""

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
    """Return a torch tensor with the view's shape and dtype that shares its memory."""
    dtype = getattr(torch, view.dtype.name)
    if not len(view.data):
        return torch.empty(view.shape, dtype=dtype)
    # torch has no read-only tensors, and writing to memory mapped for reading ends the process.
    data = view.data if view.remap is None else view.remap()
    return torch.frombuffer(data, dtype=dtype).reshape(view.shape)
