"""What the seals guarantee, tested with the file descriptor."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from layertap.errors import SharedMemoryLostError
from layertap.shm import regions
from layertap.shm.regions import Region, RegionKind, make_region, map_region, supported

pytestmark = pytest.mark.skipif(not supported(), reason="shared memory is Linux's")

SIZE = 64 * 1024
REFUSED = r"Errno (1|9|13|22)\b"  # EPERM, EBADF, EACCES; EINVAL for the size of what is read-only


@pytest.fixture
def reply() -> Iterator[Region]:
    """A reply region with some content."""
    region = make_region(1, RegionKind.REPLY, SIZE)
    region.memory[:4] = b"abcd"
    yield region
    region.close()


def as_pathname(region: Region, flags: int) -> int:
    return os.open(f"/proc/self/fd/{region.fileno()}", flags)


def protected(region: Region) -> None:
    """Request write access to a mapping that was made for reading."""
    mapped = np.frombuffer(map_region(region.fileno(), RegionKind.REPLY, SIZE), np.uint8)
    address = ctypes.c_void_p(mapped.ctypes.data)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(address, SIZE, mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), "mprotect")


def written_through_a_new_file(region: Region) -> None:
    fd = as_pathname(region, os.O_RDWR)
    try:
        os.write(fd, b"x")
    finally:
        os.close(fd)


ATTEMPTS: dict[str, Callable[[Region], object]] = {
    "map it for writing": lambda region: mmap.mmap(region.fileno(), SIZE),
    "open it anew and write": written_through_a_new_file,
    "write to it": lambda region: os.write(region.fileno(), b"x"),
    "make a mapping writable": protected,
    "shrink it": lambda region: os.ftruncate(region.fileno(), 0),
    "let it grow": lambda region: os.ftruncate(region.fileno(), 2 * SIZE),
    "let it grow by space": lambda region: os.posix_fallocate(region.fileno(), 0, 2 * SIZE),
    "take a seal off": lambda region: fcntl.fcntl(region.fileno(), 1033, 0x8),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_reply_region_can_only_be_read(reply: Region, attempt: str) -> None:
    """The holder of a reply region's descriptor can neither write to it nor change its size."""
    with pytest.raises(OSError, match=REFUSED):
        ATTEMPTS[attempt](reply)
    assert bytes(reply.memory[:4]) == b"abcd"
    assert os.fstat(reply.fileno()).st_size == SIZE


def test_server_writes_and_clients_see_it(reply: Region) -> None:
    """The mapping made before the seal can still be written to, and later mappings see this."""
    seen = map_region(reply.fileno(), RegionKind.REPLY, SIZE)
    reply.memory[:4] = b"efgh"
    assert seen[:4] == b"efgh"
    with pytest.raises(TypeError):
        seen[:4] = b"mine"


def test_private_mapping_is_nobody_elses(reply: Region) -> None:
    """Neither the server nor other clients see what is written to a private mapping."""
    private = map_region(reply.fileno(), RegionKind.REPLY, SIZE, private=True)
    private[:4] = b"mine"
    assert bytes(reply.memory[:4]) == b"abcd"
    assert map_region(reply.fileno(), RegionKind.REPLY, SIZE)[:4] == b"abcd"


def test_input_region_is_the_clients_to_write() -> None:
    """The client writes, the server reads, and neither can change the size."""
    region = make_region(1, RegionKind.INPUT, SIZE)
    map_region(region.fileno(), RegionKind.INPUT, SIZE)[:4] = b"abcd"
    assert bytes(region.memory[:4]) == b"abcd"
    assert region.memory.readonly
    for size in (0, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(region.fileno(), size)
    region.close()


def test_older_kernels_hand_out_descriptors_for_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without F_SEAL_FUTURE_WRITE, clients get a descriptor that was opened for reading."""
    real = fcntl.fcntl

    def without_the_seal(fd: int, command: int, argument: int = 0) -> int:
        if command == 1033 and argument & 0x10:
            raise OSError(errno.EINVAL, "no such seal")
        return real(fd, command, argument)

    monkeypatch.setattr(regions.fcntl, "fcntl", without_the_seal)
    region = make_region(1, RegionKind.REPLY, SIZE)
    for attempt in ("map it for writing", "write to it", "make a mapping writable", "shrink it"):
        with pytest.raises(OSError, match=REFUSED):
            ATTEMPTS[attempt](region)
    region.memory[:4] = b"abcd"
    assert map_region(region.fileno(), RegionKind.REPLY, SIZE)[:4] == b"abcd"
    region.close()


def test_file_that_may_shrink_is_not_mapped() -> None:
    """A client maps only files whose size is the announced one and sealed, so no SIGBUS occurs."""
    fd = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    with pytest.raises(SharedMemoryLostError, match="size"):
        map_region(fd, RegionKind.REPLY, SIZE)
    os.close(fd)
    region = make_region(1, RegionKind.REPLY, SIZE)
    with pytest.raises(SharedMemoryLostError, match="size"):
        map_region(region.fileno(), RegionKind.REPLY, 2 * SIZE)
    region.close()


def test_no_file_has_a_name_and_no_other_user_a_right(reply: Region) -> None:
    """Nothing is in /dev/shm, and the file's mode is 0600."""
    assert not any("layertap" in path.name for path in Path("/dev/shm").iterdir())  # noqa: S108
    assert os.fstat(reply.fileno()).st_mode & 0o777 == 0o600


def test_closed_region_lives_in_its_views() -> None:
    """A view keeps its region alive; without views, descriptor and memory are gone."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - its own descriptor counts alike
    region = make_region(1, RegionKind.REPLY, SIZE)
    view = region.memory[:4]
    region.close()
    view[:] = b"abcd"
    del view, region
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
