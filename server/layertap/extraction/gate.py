"""Keeps forward passes and symbolic tracing from overlapping, in the whole process.

torch.fx patches ``Module.__call__`` and ``Module.__getattr__`` for the whole process while it
traces, so a forward pass of any model in any thread would go through the tracer. Passes share this
gate with each other; tracing holds it exclusively.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["forward_passes", "no_forward_pass"]


class _Gate:
    def __init__(self) -> None:
        self._free = threading.Condition()
        self._passing = 0
        self._tracing = False
        self._waiting = 0
        self._mine = threading.local()

    @contextmanager
    def together(self) -> Iterator[None]:
        self._enter()
        self._mine.passing = True
        try:
            yield
        finally:
            self._mine.passing = False
            self._leave()

    @contextmanager
    def alone(self) -> Iterator[None]:
        # A thread inside ``together`` leaves it first: two threads that wait here for each other's
        # pass to end would wait forever.
        held = getattr(self._mine, "passing", False)
        if held:
            self._leave()
        with self._free:
            self._waiting += 1
            self._free.wait_for(lambda: not self._tracing and not self._passing)
            self._waiting -= 1
            self._tracing = True
        try:
            yield
        finally:
            with self._free:
                self._tracing = False
                self._free.notify_all()
            if held:
                self._enter()

    def _enter(self) -> None:
        with self._free:
            # Wait behind a waiting tracer, or it would never get its turn on a busy server.
            self._free.wait_for(lambda: not self._tracing and not self._waiting)
            self._passing += 1

    def _leave(self) -> None:
        with self._free:
            self._passing -= 1
            if not self._passing:
                self._free.notify_all()


_gate = _Gate()

forward_passes = _gate.together
"""Keep symbolic tracing in every thread from starting while the block runs. Not reentrant."""

no_forward_pass = _gate.alone
"""Keep forward passes out of the block. Inside ``forward_passes``, others may run before it."""
