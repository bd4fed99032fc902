"""Messages for the person at the terminal, or for the log, while a server runs."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Protocol

__all__ = ["Narrator"]


class Narrator(Protocol):
    """Reports the progress of serving. Called from several threads."""

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Report something that happened.

        Args:
            text: One line; it doesn't name the level.
            level: ``logging.INFO``, ``WARNING`` or ``ERROR``.
        """

    def busy(self, text: str) -> AbstractContextManager[None]:
        """Show that something is in progress that may take long."""
