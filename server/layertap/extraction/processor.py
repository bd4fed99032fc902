"""What is known of the processor, which decides the kernels of libraries and compilers."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from pathlib import Path

import torch

__all__ = ["processor"]


@cache
def processor() -> str:
    """Return the architecture, torch's name of the features, and a digest of model and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))}
    known = (platform.machine(), torch.backends.cpu.get_cpu_capability())
    digest = hashlib.blake2b(repr(sorted(kept)).encode(), digest_size=16).hexdigest()
    return f"{' '.join(known)} {digest}"
