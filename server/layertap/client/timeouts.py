"""Converts timeouts in seconds to values that gRPC accepts."""

from __future__ import annotations

import time

__all__ = ["Deadline", "bounded"]

# gRPC counts nanoseconds since 1970 in 64 bits; if that overflows, the deadline is in the past.
_LONGEST = 1e9


def bounded(seconds: float | None) -> float | None:
    """Return a timeout for gRPC; None (no limit) if it is infinite or over 30 years."""
    return None if seconds is None or seconds > _LONGEST else seconds


class Deadline:
    """The end of a time limit.

    Args:
        seconds: The limit from now on; None for no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Return the seconds that are left; None for no limit."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def within(self, seconds: float) -> bool:
        """Return whether a wait of some seconds would end before the limit."""
        return self._end is None or time.monotonic() + seconds < self._end
