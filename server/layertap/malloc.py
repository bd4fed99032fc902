"""Keeps the memory of large messages, instead of returning it to the system each time.

docs/decisions/0007-the-allocator.md explains why, with measurements.
"""

from __future__ import annotations

import mmap
import threading
import time
from pathlib import Path

from layertap.errors import InvalidInputError
from layertap.wire import codec

__all__ = ["DEFAULT_KEPT_MIB", "keep_memory", "retained_bytes"]

DEFAULT_KEPT_MIB = 1024
"""What is kept at most, in MiB, unless said otherwise: the blocks of some large replies."""

_MIB = 1 << 20
_LOOK_SECONDS = 1.0
_STATM = Path("/proc/self/statm")


def keep_memory(mib: int = DEFAULT_KEPT_MIB) -> bool:
    """Keep freed memory for the next large reply, which takes a quarter of the time then.

    For the whole process, whatever allocates there, and the rest of its life. Call it early:
    threads that already run may continue as before. Never more is kept than was in use at once, and
    a thread that looks once a second gives everything free back where it is more than ``mib``.

    ``layertap serve`` does it by itself, unless ``--no-keep-memory`` is given.

    Args:
        mib: MiB of free memory that may be kept; another call changes it.

    Returns:
        Whether it is done. False, with nothing changed, where the C library is not glibc 2.33 or
        newer: on musl and macOS, for instance.

    Raises:
        InvalidInputError: For a number below 1.
    """
    if mib < 1:
        raise InvalidInputError(f"mib: got {mib}, expected a number from 1")
    if not codec.set_malloc_bound(mib * _MIB):
        return False
    _KEEPER.keep(mib * _MIB)
    return True


def retained_bytes() -> int | None:
    """Return how much memory malloc holds free, in bytes; None if it does not tell.

    An estimate: what malloc calls free, but at most the process's anonymous memory
    (``/proc/self/statm``, see proc(5)) less malloc's blocks in use, since no memory need stand
    after free blocks. What else is anonymous, such as stacks and Python's small objects, is known
    from the last time that everything free was given back; before, it counts as retained.
    """
    return _KEEPER.retained()


class _Keeper:
    """Holds free memory to the bound that malloc itself keeps only at the heap's end."""

    def __init__(self) -> None:
        self._bound = 0
        self._other = 0
        self._thread: threading.Thread | None = None

    def keep(self, bound: int) -> None:
        """Hold to ``bound`` bytes from now on."""
        self._bound = bound
        self._trim()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="layertap-memory", daemon=True)
            self._thread.start()

    def retained(self) -> int | None:
        """See ``retained_bytes``."""
        usage = codec.malloc_usage()
        if usage is None:
            return None
        used, free = usage
        return min(free, max(0, _anonymous_bytes() - used - self._other))

    def look(self) -> None:
        """Give free memory back where it is more than the bound."""
        retained = self.retained()
        if retained is not None and retained > self._bound:
            self._trim()

    def _trim(self) -> None:
        codec.trim_memory()
        usage = codec.malloc_usage()
        if usage is not None:
            # No page is free now, so that what is not in use by malloc is not malloc's.
            self._other = max(0, _anonymous_bytes() - usage[0])

    def _run(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            self.look()


def _anonymous_bytes() -> int:
    _, resident, shared, *_ = map(int, _STATM.read_bytes().split())
    return (resident - shared) * mmap.PAGESIZE


_KEEPER = _Keeper()
