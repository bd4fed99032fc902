"""Which device models run on."""

from __future__ import annotations

import torch

from layertap.errors import ConfigError

__all__ = ["choose_device"]


def choose_device(wanted: str) -> str:
    """Return ``"cpu"`` or ``"cuda"`` for ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Raises:
        ConfigError: For CUDA where there is none, and for anything else.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: got {wanted!r}, expected 'auto', 'cpu' or 'cuda'")
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise ConfigError(
            "device: got 'cuda', but PyTorch finds no CUDA device here; expected 'cpu' or 'auto'"
        )
    return "cuda" if has_cuda and wanted != "cpu" else "cpu"
