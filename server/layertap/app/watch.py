"""Watches the files of a configuration and of its models."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from layertap.app.fingerprint import FileStates, file_states

__all__ = ["Watcher"]

INTERVAL_SECONDS = 1.0


class Watcher:
    """Looks at files again and again, and tells when they changed and have settled.

    By their state (``stat``), which works on network and container mounts as well, where the
    kernel's notifications don't. A file that is still being written differs from one look to the
    next, and is waited for.

    Args:
        files: Returns the files to look at; asked each time.
        changed: Called in the watcher's thread.
    """

    def __init__(self, files: Callable[[], Iterable[Path]], changed: Callable[[], None]) -> None:
        self._files = files
        self._changed = changed
        self._told = file_states(files())
        self._seen: FileStates = self._told
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="layertap-watch", daemon=True)

    def start(self) -> None:
        """Begin to look. What changed since construction is told too."""
        self._thread.start()

    def look(self) -> None:
        """Look once: two looks that see one and the same change tell it."""
        now = file_states(self._files())
        settled, self._seen = now == self._seen, now
        if settled and now != self._told:
            self._told = now
            self._changed()

    def close(self) -> None:
        """Look no more."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while not self._ended.wait(INTERVAL_SECONDS):
            self.look()
