"""Records what differs from a snapshot while passes run."""

from __future__ import annotations

import sys
import threading
import time

import torch

from layertap.extraction.state.node import Change, Node
from layertap.extraction.state.snapshot import Snapshot

__all__ = ["Watch"]

WATCH_SECONDS = 3.0
"""Time for comparing during a watched pass. Later changes are seen only when the pass has ended."""

SMALL_NODES = 1000
"""Up to this number of objects, comparing is so fast that it is done at every module."""


class Watch:
    """Records what differs from a snapshot while passes run, even if only briefly.

    Args:
        snapshot: The state before the passes.

    Attributes:
        changes: The differences seen so far, by path.
        threads: The ids of the threads on which modules ran.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.changes: dict[str, Change] = {}
        self.threads: set[int] = set()
        self._nodes = list(snapshot.nodes)
        self._by_owner = snapshot.by_owner()
        self._lock = threading.Lock()
        self._spent = 0.0
        self._next = 0.0

    def look(self) -> None:
        """Compare now, unless the time for comparing is used up."""
        # Don't wait for the lock: comparing may itself run code that is followed line by line.
        if not self._lock.acquire(blocking=False):
            return
        try:
            begun = time.perf_counter()
            if self._spent < WATCH_SECONDS:
                self._compare(self._nodes)
                ended = time.perf_counter()
                self._spent += ended - begun
                self._next = ended + 2 * (ended - begun)
        finally:
            self._lock.release()

    def look_at(self, owner: object) -> None:
        """Compare one module's state; in a small model, or now and then, compare all of it.

        In a large model, a write by one module's code to another module may be noticed late.
        """
        if len(self._nodes) <= SMALL_NODES or time.perf_counter() >= self._next:
            self.look()
        elif id(owner) in self._by_owner and self._lock.acquire(blocking=False):
            try:
                self._compare(self._by_owner[id(owner)])
            finally:
                self._lock.release()

    def look_now_and_then(self) -> None:
        """Compare: always in a small model, in others for at most a third of the time."""
        if torch.compiler.is_compiling():
            return  # torch.compile would trace the comparison as part of the model.
        self.threads.add(threading.get_ident())
        if len(self._nodes) > SMALL_NODES and time.perf_counter() < self._next:
            return
        # Don't trace our own code line by line, which would take most of the time.
        tracing = sys.gettrace()
        sys.settrace(None)
        try:
            self.look()
        finally:
            sys.settrace(tracing)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _compare(self, nodes: list[Node]) -> None:
        differing = []
        for node in nodes:
            keys = node.differing() if node.suspect() else ()
            for key in keys:
                change = node.change(key)
                self.changes.setdefault(change.path, change)
            if keys:
                differing.append(node)
        # Once is enough: an object that changes on every line need not be compared every time.
        for node in differing:
            for known in (self._nodes, *self._by_owner.values()):
                if node in known:
                    known.remove(node)
