"""Disks that are full or read-only: small file systems in memory, mounted for one test."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

__all__ = ["SmallDisk", "small_disk"]


class SmallDisk:
    """A mounted file system.

    Attributes:
        folder: Where it is mounted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        """Fill it up with a file called ``filler``."""
        file = os.open(self.folder / "filler", os.O_WRONLY | os.O_CREAT)
        try:
            for size in (1 << 16, 4096, 1):
                with suppress(OSError):
                    while True:
                        os.write(file, bytes(size))
        finally:
            os.close(file)

    def forbid_writing(self) -> None:
        """Make it read-only."""
        _run("mount", "-o", "remount,ro", str(self.folder))

    def names(self) -> list[str]:
        """Return the names of the files on it, except the filler."""
        return sorted(path.name for path in self.folder.iterdir() if path.name != "filler")


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[SmallDisk]:
    """Mount a file system of a size such as ``64k``; skip the test if mounting is not allowed."""
    folder.mkdir()
    try:
        _run("mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"may not mount a file system: {error}")
    try:
        yield SmallDisk(folder)
    finally:
        # Lazily: a process that the test has ended may still be about to close a file there.
        _run("umount", "--lazy", str(folder))


def _run(name: str, *args: str) -> None:
    path = shutil.which(name) or name
    subprocess.run([path, *args], check=True, capture_output=True, text=True)
