"""Programs are in memory once while they are stored, and are whole."""

from __future__ import annotations

import gc
import io
import mmap
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from layertap.extraction.memory_file import bytes_of, memory_file, write_program
from layertap.silence import warnings_ignored

WIDTH = 4096
"""The weights of the program have 64 MiB."""


@pytest.fixture(scope="module")
def program() -> torch.jit.ScriptModule:
    torch.manual_seed(0)
    with warnings_ignored():
        return torch.jit.freeze(
            torch.jit.trace(nn.Linear(WIDTH, WIDTH).eval(), torch.rand(2, WIDTH))
        )


def stored(program: torch.jit.ScriptModule) -> memoryview:
    with memory_file() as file:
        write_program(program, file)
        return bytes_of(file)


def peak() -> int:
    """Return the most bytes that this process had in RAM."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has files in memory")
def test_a_program_is_in_memory_once(program: torch.jit.ScriptModule) -> None:
    """The bytes count as memory of this process once they are read; torch's copies would too."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # The peak is what is there now.
    before = peak()
    sum(stored(program)[:: mmap.PAGESIZE])
    assert peak() - before < 1.5 * 4 * WIDTH**2


def test_a_program_in_memory_is_whole(program: torch.jit.ScriptModule, monkeypatch) -> None:
    """Also where there are no files in memory, as on macOS."""
    x = torch.rand(3, WIDTH)
    for here in (True, False):
        if not here:
            monkeypatch.delattr(os, "memfd_create")
        with warnings_ignored():
            again = torch.jit.load(io.BytesIO(stored(program)))
        assert torch.equal(again(x), program(x))


def page() -> int:
    return os.sysconf("SC_PAGE_SIZE")
