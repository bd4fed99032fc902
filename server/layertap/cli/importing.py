"""Imports PyTorch without the work of Python's garbage collector.

While modules are imported, the collector looks at every new function and class again and again, and
finds no garbage: this takes 0.3 of the 2.2 seconds of importing the server's parts. Later it would
look at them in each full collection, during which every thread waits.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_collecting"]


@contextmanager
def without_collecting() -> Iterator[None]:
    """Turn the collector off in the block, and let it skip for good what there is at its end.

    Cycles among these objects are never freed. So this is for commands, not for libraries, and the
    block should only import. If PyTorch is imported already, as where a program runs a command by
    itself, this does nothing.
    """
    if "torch" in sys.modules:
        yield
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
