"""Watches the files of a configuration and of its models."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from layertap.app.fingerprint import FileStates, file_states

__all__ = ["Watcher"]

INTERVAL_SECONDS = 1.0


class Watcher:
    """Polls files, and reports when they have changed and are stable.

    It uses ``stat``, which also works on network and container mounts, where the kernel's
    notifications don't. A file that is still being written differs between two checks, so the
    watcher waits until it is stable.

    Args:
        files: Returns the files to check; called for each check.
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
        """Start the thread. Changes since construction are reported too."""
        self._thread.start()

    def look(self) -> None:
        """Check once; report a change that two checks in a row have seen."""
        now = file_states(self._files())
        settled, self._seen = now == self._seen, now
        if settled and now != self._told:
            self._told = now
            self._changed()

    def close(self) -> None:
        """Stop checking."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while not self._ended.wait(INTERVAL_SECONDS):
            self.look()
