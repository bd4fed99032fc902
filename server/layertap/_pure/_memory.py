"""malloc's settings, through ctypes; see ``layertap._core.keep_memory``."""

from __future__ import annotations

import ctypes
import sys

from layertap._pure._wire import int64

# glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8
_INT_MAX = 2**31 - 1


class _Mallinfo2(ctypes.Structure):
    """``struct mallinfo2``, see mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):  # musl, and glibc before 2.33
        return None
    libc.mallinfo2.restype = _Mallinfo2
    return libc


_LIBC = _glibc()


def keep_memory(bound: int) -> bool:
    """See ``layertap._core.keep_memory``."""
    bound = _from_one("bound", bound)
    if _LIBC is None:
        return False
    settings = (
        (_M_MMAP_MAX, 0),
        (_M_TRIM_THRESHOLD, bound if bound <= _INT_MAX else -1),
        (_M_ARENA_MAX, 1),
    )
    return all(_LIBC.mallopt(name, value) == 1 for name, value in settings)


def map_large_blocks(least: int) -> bool:
    """See ``layertap._core.map_large_blocks``."""
    size = _from_one("least", least)
    if _LIBC is None or size > _INT_MAX:
        return False
    settings = ((_M_MMAP_THRESHOLD, size), (_M_ARENA_MAX, 1))
    return all(_LIBC.mallopt(name, value) == 1 for name, value in settings)


def _from_one(name: str, number: int) -> int:
    value = int64(number)
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected from 1")
    return value


def trim_memory() -> bool:
    """See ``layertap._core.trim_memory``."""
    if _LIBC is None:
        return False
    _LIBC.malloc_trim(0)
    return True


def malloc_usage() -> tuple[int, int] | None:
    """See ``layertap._core.malloc_usage``."""
    if _LIBC is None:
        return None
    info = _LIBC.mallinfo2()
    return info.uordblks + info.hblkhd, info.fordblks
