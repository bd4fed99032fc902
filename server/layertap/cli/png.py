"""Writes PNG files, which a client without Pillow needs too."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np

__all__ = ["png"]


def png(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """Return the bytes of a PNG file.

    Args:
        pixels: ``[H, W, 3]``, red, green and blue.
    """
    height, width, _ = pixels.shape
    # Each row begins with the number of its filter; 0 is none.
    rows = np.concatenate(
        [np.zeros((height, 1), np.uint8), pixels.reshape(height, width * 3)], axis=1
    )
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (("IHDR", head), ("IDAT", zlib.compress(rows.tobytes(), 9)), ("IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind.encode(), data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
