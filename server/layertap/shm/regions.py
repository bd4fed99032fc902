"""Regions: anonymous files in memory that a server makes, sizes and seals.

Note [Seals]
    A region can neither shrink nor grow, so no access to its mapping ever raises SIGBUS. Once the
    server has mapped a reply region, only that mapping can write to it (F_SEAL_FUTURE_WRITE, Linux
    5.1). If the kernel has no such seal, clients get a file descriptor that was opened for reading.
    Clients write to input regions, which the server maps for reading. Once set, the seals can be
    neither removed nor extended; see fcntl(2) and memfd_create(2).

Note [Nothing is left behind]
    The files have no name in any file system. Linux frees a file when the last process that has a
    descriptor or a mapping of it ends, however it ends.
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

__all__ = ["Region", "RegionKind", "make_region", "map_region", "supported"]

# From <linux/fcntl.h>; Python has no name for the last one.
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW, _F_SEAL_FUTURE_WRITE = 0x1, 0x2, 0x4, 0x10
_FIXED_SIZE = _F_SEAL_SHRINK | _F_SEAL_GROW
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034


class RegionKind(IntEnum):
    """The direction of the data."""

    REPLY = 1
    INPUT = 2


class Region:
    """A region in the server.

    Attributes:
        number: Unique among all regions that the server has made.
        kind: The direction of the data.
        size: The size in bytes.
        generation: The number of its current or last lease, from 1.
        memory: The server's mapping, read-only for inputs; views keep it alive.
    """

    def __init__(self, number: int, kind: RegionKind, fd: int, memory: mmap.mmap) -> None:
        self.number = number
        self.kind = kind
        self.size = len(memory)
        self.generation = 0
        self.memory = memoryview(memory)
        self._fd = fd

    def fileno(self) -> int:
        """Return the file descriptor to send to clients."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor; the mapping ends with the last view of it."""
        os.close(self._fd)
        self.memory = memoryview(b"")


def supported() -> bool:
    """Return whether this system supports shared memory: Linux does."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


def make_region(number: int, kind: RegionKind, size: int) -> Region:
    """Make a region of zeros; raise OSError if the system can't."""
    fd = os.memfd_create("layertap", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, size)
        if kind is RegionKind.INPUT:
            memory = mmap.mmap(fd, size, prot=mmap.PROT_READ)
            fcntl.fcntl(fd, _F_ADD_SEALS, _FIXED_SIZE | _F_SEAL_SEAL)
            return Region(number, kind, fd, memory)
        memory = mmap.mmap(fd, size)
        return Region(number, kind, _sealed_for_reading(fd), memory)
    except BaseException:
        os.close(fd)
        raise


def _sealed_for_reading(fd: int) -> int:
    """Seal a mapped file, and return the descriptor for clients."""
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


def map_region(fd: int, kind: RegionKind, size: int, *, private: bool = False) -> mmap.mmap:
    """Map a region in the client.

    Args:
        fd: The region's descriptor.
        kind: Inputs are mapped for writing, replies for reading.
        size: The size that the server reports, in bytes.
        private: Whether to map a reply for writing instead: a page is copied when it is first
            written to, so no other process sees what is written.

    Raises:
        SharedMemoryLostError: If the file has another size, or its size is not sealed.
        OSError: If the system can't map it.
    """
    if os.fstat(fd).st_size != size or fcntl.fcntl(fd, _F_GET_SEALS) & _FIXED_SIZE != _FIXED_SIZE:
        raise SharedMemoryLostError("shared memory: got a region whose size is not sealed")
    if private:
        return mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    if kind is RegionKind.INPUT:
        return mmap.mmap(fd, size)
    return mmap.mmap(fd, size, prot=mmap.PROT_READ)
