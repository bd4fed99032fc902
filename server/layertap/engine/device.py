"""Chooses the device that models run on."""

from __future__ import annotations

import re

import torch

from layertap.errors import ConfigError
from layertap.settings.value_kinds import DEVICE_PATTERN

__all__ = ["choose_device"]


def choose_device(wanted: str) -> str:
    """Return the device to use: ``"cpu"``, ``"cuda"`` or, for example, ``"cuda:1"``.

    Args:
        wanted: One of these, or ``"auto"`` for CUDA if there is such a device, else the CPU.

    Raises:
        ConfigError: If there is no such device, or ``wanted`` is something else.
    """
    if not re.fullmatch(DEVICE_PATTERN, wanted):
        raise ConfigError(f"device: got {wanted!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:1'")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted in ("auto", "cpu"):
        return "cuda" if found and wanted == "auto" else "cpu"
    if not found:
        raise ConfigError(
            f"device: got {wanted!r}, but PyTorch finds no CUDA device here; expected 'cpu' or "
            f"'auto'"
        )
    if int(wanted.partition(":")[2] or 0) >= found:
        raise ConfigError(f"device: got {wanted!r}, expected cuda:0 to cuda:{found - 1}")
    return wanted
