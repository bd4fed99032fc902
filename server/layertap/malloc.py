"""Keeps freed memory of large messages for reuse, instead of returning it to the system.

docs/decisions/0007-the-allocator.md explains why, with measurements.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layertap.errors import InvalidInputError
from layertap.wire import codec

__all__ = [
    "DEFAULT_KEPT_MIB",
    "begin_loading",
    "keep_memory",
    "retained_bytes",
    "return_memory",
    "sparing_memory",
]

DEFAULT_KEPT_MIB = 1024
"""Default limit of kept memory in MiB: enough for the blocks of several large replies."""

_MIB = 1 << 20

_USUAL_BYTES = 32 * _MIB
"""Blocks from this size on are returned when they are freed; glibc's own threshold grows to it."""

_SMALL_BYTES = _MIB
"""The same while a large model is measured. With 4 MiB efficientnet_v2_l took 0.1 GiB more."""

_LARGE_WEIGHTS = 256 * _MIB
"""Bytes of weights from which a model is large.

Measuring takes a third longer this way: 26 instead of 19 s for resnet50, which is not large.
"""

_LOOK_SECONDS = 1.0
_STATM = Path("/proc/self/statm")


def keep_memory(mib: int = DEFAULT_KEPT_MIB) -> bool:
    """Keep freed memory for the next large reply, which then takes a quarter of the time.

    This affects all allocations of the process, for the rest of its life. Call it early: threads
    that already run may not be affected. At most as much is kept as was ever in use at one time. A
    thread checks once a second, and returns all free memory if it exceeds ``mib``.

    ``layertap serve`` does this by itself, unless ``--no-keep-memory`` is given.

    Args:
        mib: MiB of free memory that may be kept; a later call changes it.

    Returns:
        Whether memory is kept. False, with nothing changed, if the C library is not glibc 2.33 or
        newer: for instance on musl or macOS.

    Raises:
        InvalidInputError: If ``mib`` is below 1.
    """
    if mib < 1:
        raise InvalidInputError(f"mib: got {mib}, expected a number from 1")
    _KEEPER.loading = False
    if not codec.set_malloc_bound(mib * _MIB):
        return False
    _KEEPER.keep(mib * _MIB)
    return True


def begin_loading() -> bool:
    """Let ``sparing_memory`` save memory from now on, until ``keep_memory`` is called.

    Call it early, as ``keep_memory``: from now on all threads share one heap. ``layertap serve``
    calls it before it loads the models of its configuration, unless ``--no-keep-memory`` is given.

    Returns:
        False, with nothing changed, if the C library is not glibc 2.33 or newer.
    """
    _KEEPER.loading = codec.map_large_blocks(_USUAL_BYTES)
    return _KEEPER.loading


@contextmanager
def sparing_memory(weight_bytes: int) -> Iterator[None]:
    """Return each large block of memory as soon as it is freed, while a large model is measured.

    This affects all threads, whose allocations take longer meanwhile. So it is done only between
    ``begin_loading`` and ``keep_memory``, before there are any requests.

    Args:
        weight_bytes: The bytes of the model's weights.
    """
    sparing = _KEEPER.loading and weight_bytes > _LARGE_WEIGHTS
    if sparing:
        codec.map_large_blocks(_SMALL_BYTES)
    try:
        yield
    finally:
        if sparing:
            codec.map_large_blocks(_USUAL_BYTES)


def retained_bytes() -> int | None:
    """Return the bytes of free memory that malloc has not returned; None if it doesn't report it.

    This is an estimate. malloc also counts free blocks without memory behind them. So the result
    is at most the process's anonymous memory (``/proc/self/statm``, see proc(5)) minus malloc's
    blocks in use and minus other anonymous memory, such as stacks and Python's small objects. The
    latter is measured whenever all free memory is returned; before the first time it counts as
    free.
    """
    return _KEEPER.retained()


def return_memory() -> None:
    """Return all free memory to the system, which takes some milliseconds.

    Call it between steps that need much memory for different things, so that the process does not
    need the memory of all of them at once.
    """
    codec.trim_memory()


class _Keeper:
    """Keeps free memory below the bound. malloc itself does so only at the end of the heap."""

    def __init__(self) -> None:
        self.loading = False
        """Whether ``sparing_memory`` may save memory."""
        self._bound = 0
        self._other = 0
        self._thread: threading.Thread | None = None

    def keep(self, bound: int) -> None:
        """Keep free memory below ``bound`` bytes from now on."""
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
        """Return free memory to the system if it exceeds the bound."""
        retained = self.retained()
        if retained is not None and retained > self._bound:
            self._trim()

    def _trim(self) -> None:
        codec.trim_memory()
        usage = codec.malloc_usage()
        if usage is not None:
            # No free page is left, so anonymous memory not in use by malloc belongs to others.
            self._other = max(0, _anonymous_bytes() - usage[0])

    def _run(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            self.look()


def _anonymous_bytes() -> int:
    _, resident, shared, *_ = map(int, _STATM.read_bytes().split())
    return (resident - shared) * mmap.PAGESIZE


_KEEPER = _Keeper()
