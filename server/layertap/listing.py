"""Lists names in messages, which stay short however many there are."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

__all__ = ["NAMED", "listed"]

NAMED = 8
"""Names that a message lists."""


def listed(names: Iterable[str], most: int = NAMED) -> str:
    """Return the first names with commas between them, and how many more there are.

    Args:
        names: The names, quoted if the message quotes them.
        most: How many of them to list.
    """
    rest = iter(names)
    shown = ", ".join(islice(rest, most))
    more = sum(1 for _ in rest)
    return f"{shown} and {more} more" if more else shown
