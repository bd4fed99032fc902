"""Where the content of a tensor is: in its own memory, or in other tensors that it holds.

Note [Wrapper subclasses]
    The quantised weights of torchao, a ``DTensor`` and a ``MaskedTensor`` are subclasses of Tensor
    that hold other tensors in attributes. Their ``__torch_dispatch__`` computes with these. torch
    calls them wrapper subclasses. They have a shape, a dtype and a storage of the size that this
    makes, but the storage has no memory: who reads it reads address 0, and the process ends. So
    memory is read, copied and compared only where ``plain_tensors`` leads to.

    What ``__torch_dispatch__`` does is code in Python. A TorchScript program can't contain it; it
    would hold the wrapper as a constant and read its memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from blake3 import blake3

__all__ = ["PLAIN", "computes_in_python", "digest_of_elements", "is_wrapper", "plain_tensors"]

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""The classes of tensors without attributes or operations of their own."""

MAX_LEVELS = 8
"""Levels of wrappers inside wrappers that are followed."""


def computes_in_python(kind: type[torch.Tensor]) -> bool:
    """Return whether a class defines in Python what operations do with its tensors."""
    return kind not in PLAIN and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has no memory of its own; see Note [Wrapper subclasses]."""
    if not computes_in_python(type(tensor)):
        return False
    if hasattr(tensor, "__tensor_flatten__"):
        return True
    try:
        return tensor.numel() > 0 and not tensor.data_ptr()
    except RuntimeError:  # Some refuse to tell their address.
        return True


def plain_tensors(tensor: torch.Tensor, levels: int = MAX_LEVELS) -> Iterator[torch.Tensor]:
    """Yield the dense tensors that hold a tensor's content.

    For a wrapper these are the tensors in it, for a sparse tensor its indices and values, and for
    others the tensor itself.
    """
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        yield from (tensor.indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif not is_wrapper(tensor):
        yield tensor
    elif levels:
        for member in _wrapped(tensor):
            yield from plain_tensors(member, levels - 1)


def _wrapped(wrapper: Any) -> list[torch.Tensor]:
    """Return the tensors in a wrapper, in the order of their names."""
    if hasattr(wrapper, "__tensor_flatten__"):
        names = wrapper.__tensor_flatten__()[0]
        members = [getattr(wrapper, name) for name in sorted(names)]
    else:
        members = [vars(wrapper)[name] for name in sorted(vars(wrapper))]
    return [member for member in members if isinstance(member, torch.Tensor)]


def digest_of_elements(tensor: torch.Tensor) -> str:
    """Return a BLAKE3 digest of a dense tensor's dtype, shape and elements, wherever they are.

    BLAKE3 takes about 0.03 s for each 100 MB on one core; hashlib's BLAKE2 takes 0.2 s.
    """
    digest = blake3(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.is_quantized:  # Its scales count too, of which there may be one for each channel.
        tensor = tensor.dequantize()
    # Complex conjugates and negatives may be views of the numbers before.
    elements = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    digest.update(elements.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest(length=16)
