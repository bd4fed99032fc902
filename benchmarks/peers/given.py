"""What callers send to every peer. Needs no PyTorch: neither do the callers of a server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

__all__ = ["IMAGE", "ITEM", "LAYERS", "PHOTO", "TENSOR", "Announce", "Ask", "given", "kinds"]

LAYERS = ("layer1", "avgpool")
TENSOR, IMAGE = "tensor", "image"
ITEM = (3, 224, 224)
PHOTO = Path(__file__).resolve().parents[2] / "examples" / "images" / "grace_hopper.jpg"

Ask = Callable[[str, bytes], "bytes | memoryview"]
"""Sends a request of a kind, a tensor ``[B, 3, 224, 224] float32`` or a JPEG file, and returns the
layer as float32."""

Announce = Callable[[str], None]
"""Takes the address of a server that is ready."""


def kinds() -> list[str]:
    """Return the names of what is served: a layer and what is sent for it."""
    return [f"{layer}-{sent}" for layer in LAYERS for sent in (TENSOR, IMAGE)]


def given(kind: str, batch: int) -> bytes:
    """Return what callers send: a photograph, or random numbers."""
    if kind.endswith(IMAGE):
        return PHOTO.read_bytes()
    return np.random.default_rng(0).random((batch, *ITEM), np.float32).tobytes()
