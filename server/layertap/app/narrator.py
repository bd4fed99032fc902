"""Messages for the person at the terminal, or for the log, while a server runs."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Protocol

__all__ = ["Narrator"]


class Narrator(Protocol):
    """Reports how serving goes. Called from several threads."""

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Report something that happened.

        Args:
            text: One line, without a word for the level.
            level: ``logging.INFO``, ``WARNING`` or ``ERROR``.
        """

    def busy(self, text: str) -> AbstractContextManager[None]:
        """Show that something is going on that may take long."""
