"""Converts timeouts in seconds to values that gRPC accepts."""

from __future__ import annotations

__all__ = ["bounded"]

# gRPC counts nanoseconds since 1970 in 64 bits: what overflows them is a deadline that has passed.
_LONGEST = 1e9


def bounded(seconds: float | None) -> float | None:
    """Return a timeout for gRPC: None, which is no end, for more than 30 years, or infinity."""
    return None if seconds is None or seconds > _LONGEST else seconds
