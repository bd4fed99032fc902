"""Regions: anonymous files in memory that a server makes, sizes and seals.

Note [Seals]
    A region can neither shrink nor grow, so that no access to its mapping is ever a SIGBUS. Once
    the server has mapped a reply region, nobody can write to it any more but through that mapping
    (F_SEAL_FUTURE_WRITE, Linux 5.1). Where the kernel has no such seal, clients get a file
    descriptor that was opened for reading. Input regions are the client's to write; the server maps
    them for reading. No seal can be taken off or added, see fcntl(2) and memfd_create(2).

Note [Nothing is left behind]
    The files have no name in any file system. The last of the processes that hold one, by a
    descriptor or a mapping, takes it along when it ends, however it ends.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from enum import IntEnum

from layertap.errors import SharedMemoryLostError

if sys.platform == "linux":
    import fcntl

__all__ = ["Kind", "Region", "make_region", "map_region", "supported"]

# <linux/fcntl.h>; Python has no name for the last one.
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW, _F_SEAL_FUTURE_WRITE = 0x1, 0x2, 0x4, 0x10
_FIXED_SIZE = _F_SEAL_SHRINK | _F_SEAL_GROW
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034


class Kind(IntEnum):
    """Which way the data goes."""

    REPLY = 1
    INPUT = 2


class Region:
    """A region, as the server has it.

    Attributes:
        number: Tells it from all others that the server ever made.
        kind: Which way the data goes.
        size: Bytes.
        generation: Which lease it is in, or was in last; from 1.
        memory: The server's mapping, read-only for inputs; kept by whoever views it.
    """

    def __init__(self, number: int, kind: Kind, fd: int, memory: mmap.mmap) -> None:
        self.number = number
        self.kind = kind
        self.size = len(memory)
        self.generation = 0
        self.memory = memoryview(memory)
        self._fd = fd

    def fileno(self) -> int:
        """Return the file descriptor that clients get."""
        return self._fd

    def close(self) -> None:
        """Let go of it; the mapping goes when nothing views it any more."""
        os.close(self._fd)
        self.memory = memoryview(b"")


def supported() -> bool:
    """Tell whether this system has what shared memory needs: it is Linux."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


def make_region(number: int, kind: Kind, size: int) -> Region:
    """Make a region of zeros; raise OSError where the system refuses."""
    fd = os.memfd_create("layertap", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, size)
        if kind is Kind.INPUT:
            memory = mmap.mmap(fd, size, prot=mmap.PROT_READ)
            fcntl.fcntl(fd, _F_ADD_SEALS, _FIXED_SIZE | _F_SEAL_SEAL)
            return Region(number, kind, fd, memory)
        memory = mmap.mmap(fd, size)
        return Region(number, kind, _sealed_for_reading(fd), memory)
    except BaseException:
        os.close(fd)
        raise


def _sealed_for_reading(fd: int) -> int:
    """Seal a file that is mapped, and return the descriptor to hand out."""
    try:
        fcntl.fcntl(fd, _F_ADD_SEALS, _FIXED_SIZE | _F_SEAL_FUTURE_WRITE | _F_SEAL_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    else:
        return fd
    fcntl.fcntl(fd, _F_ADD_SEALS, _FIXED_SIZE | _F_SEAL_SEAL)
    reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    os.close(fd)
    return reading


def map_region(fd: int, kind: Kind, size: int, *, private: bool = False) -> mmap.mmap:
    """Map a region that was received, for a client.

    Args:
        fd: Its descriptor.
        kind: Inputs are mapped for writing, replies for reading.
        size: Bytes that it is said to have.
        private: Map a reply for writing instead: what is written is nobody else's, as the page
            is copied when it is written to first.

    Raises:
        SharedMemoryLostError: For a file that has another size, or may yet get one.
        OSError: Where the system refuses.
    """
    if os.fstat(fd).st_size != size or fcntl.fcntl(fd, _F_GET_SEALS) & _FIXED_SIZE != _FIXED_SIZE:
        raise SharedMemoryLostError("shared memory: got a region whose size is not sealed")
    if private:
        return mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    if kind is Kind.INPUT:
        return mmap.mmap(fd, size)
    return mmap.mmap(fd, size, prot=mmap.PROT_READ)
