"""Keeps forward passes and symbolic tracing from overlapping, in the whole process.

torch.fx patches ``Module.__call__`` and ``Module.__getattr__`` for everybody while it traces, so a
forward pass of any model in any thread would go through the tracer. Passes hold this gate together,
tracing holds it alone.
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
        # Who traces in the middle of its own turn lets the others pass first: of two that wait for
        # each other's end neither would ever begin.
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
            # Behind one that waits, or a busy server would never let it trace.
            self._free.wait_for(lambda: not self._tracing and not self._waiting)
            self._passing += 1

    def _leave(self) -> None:
        with self._free:
            self._passing -= 1
            if not self._passing:
                self._free.notify_all()


_gate = _Gate()

forward_passes = _gate.together
"""Hold off symbolic tracing in every thread for as long as the block runs models. Not nested."""

no_forward_pass = _gate.alone
"""Do what no forward pass may see. Within ``forward_passes`` others may pass before the block."""
