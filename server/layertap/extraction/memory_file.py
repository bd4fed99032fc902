"""Files in memory, and TorchScript programs in them.

torch's own writer ends the process if the disk is full (``std::terminate`` in a destructor;
pytorch/pytorch#156955), so a program is never written directly to a disk. To a Python file torch
first makes two copies of the whole program. To a path it writes part after part, and a file in
memory has a path on Linux.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import IO

import torch

from layertap.silence import warnings_ignored

__all__ = ["bytes_of", "memory_file", "write_program"]


def memory_file() -> IO[bytes]:
    """Return an empty file in memory; a temporary file where the system has none."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("layertap"), "w+b")
    return tempfile.TemporaryFile()


def write_program(program: torch.jit.ScriptModule, file: IO[bytes]) -> None:
    """Write a program to an empty file in memory, and go to its begin.

    Passes on any exception of torch.
    """
    with warnings_ignored():  # torch.jit is deprecated.
        if hasattr(os, "memfd_create"):
            torch.jit.save(program, f"/proc/self/fd/{file.fileno()}")
        else:
            torch.jit.save(program, file)
    file.seek(0)


def bytes_of(file: IO[bytes]) -> memoryview:
    """Return the bytes of a file that is not empty; they stay when it is closed."""
    file.flush()
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
