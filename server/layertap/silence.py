"""Ignores Python warnings temporarily, safely in a process with many threads.

Python keeps one list of warning filters for the whole process. ``warnings.catch_warnings`` replaces
that list and later restores the former one. If two threads do this at overlapping times, the wrong
list can stay for good. So all code of layertap that ignores warnings uses ``warnings_ignored``
instead, which is the only place where the filters change.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

__all__ = ["warnings_ignored"]

_Filters = list[tuple[Any, ...]]

_IGNORE_ALL = ("ignore", None, Warning, None, 0)

_lock = threading.Lock()
_blocks = 0
_changed: list[_Filters] = []


@contextmanager
def warnings_ignored() -> Iterator[None]:
    """Ignore every Python warning of the process inside the block.

    Blocks may overlap, in one thread or several: warnings are ignored until the last block ends.
    Only the filter that the first block added is removed, so filters that other code sets meanwhile
    stay. No lock is held while a block runs.
    """
    _begin()
    try:
        yield
    finally:
        _end()


def _begin() -> None:
    global _blocks  # noqa: PLW0603 - the list of filters is global to the process as well
    with _lock:
        _blocks += 1
        filters = _filters()
        # Other code, such as pytest, may have replaced the list meanwhile.
        if not any(entry is _IGNORE_ALL for entry in filters):
            filters.insert(0, _IGNORE_ALL)
            _changed.append(filters)


def _end() -> None:
    global _blocks  # noqa: PLW0603 - as above
    with _lock:
        _blocks -= 1
        if _blocks:
            return
        for filters in (*_changed, _filters()):
            # Compared by identity, because the program may have an equal filter of its own.
            filters[:] = [entry for entry in filters if entry is not _IGNORE_ALL]
        _changed.clear()


def _filters() -> _Filters:
    return cast(_Filters, warnings.filters)
