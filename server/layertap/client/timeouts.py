"""Converts timeouts in seconds to values that gRPC accepts."""

from __future__ import annotations

__all__ = ["bounded"]

# gRPC counts nanoseconds since 1970 in 64 bits; if that overflows, the deadline is in the past.
_LONGEST = 1e9


def bounded(seconds: float | None) -> float | None:
    """Return a timeout for gRPC; None (no limit) if it is infinite or over 30 years."""
    return None if seconds is None or seconds > _LONGEST else seconds
