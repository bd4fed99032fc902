"""The most memory that a call takes, by the kernel's own count."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

__all__ = ["MIB", "added_by", "forget", "peak"]

MIB = 1 << 20


def added_by(call: Callable[[], object]) -> int:
    """Return the bytes that one call adds at most to what is in RAM."""
    before = forget()
    call()
    return peak() - before


def forget() -> int:
    """Give back what is free, forget the highest memory so far, and return the bytes in RAM.

    Linux only: proc(5), ``clear_refs``.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    return peak()


def peak() -> int:
    """Return the most bytes that this process had in RAM since then."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
