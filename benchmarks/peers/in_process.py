"""No server: the caller runs the program itself. What each server adds is added to this."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from peers.given import Announce, Ask

__all__ = ["connect", "serve"]


def serve(threads: int, announce: Announce) -> None:
    """Serve nothing: the address is the number of threads."""
    announce(str(threads))
    sys.stdin.read()


@contextmanager
def connect(address: str) -> Iterator[Ask]:
    """Yield what runs the program."""
    answers = _subject(int(address)).answers()
    yield lambda kind, data: answers[kind](data)


@lru_cache
def _subject(threads: int) -> Any:
    """Return the programs, which a process builds once."""
    from peers.subject import Subject

    return Subject(threads)
