"""One caller's patience: a deadline and a way to give up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from layertap.errors import CancelledError, DeadlineExceededError

__all__ = ["Call"]


class Call:
    """The life of one request.

    Args:
        timeout: Seconds until the caller stops waiting; None for no end. So is anything over
            ``threading.TIMEOUT_MAX``, such as what gRPC says of a call without a deadline.
        own: Whether it is the server's own work, which a full queue of requests doesn't refuse.
    """

    def __init__(self, timeout: float | None = None, *, own: bool = False) -> None:
        self.own = own
        self.started_ns = time.perf_counter_ns()
        endless = timeout is None or timeout > threading.TIMEOUT_MAX
        self._expires = None if endless else time.monotonic() + (timeout or 0.0)
        self._lock = threading.Lock()
        self._cancelled = False
        self._on_cancel: list[Callable[[], object]] = []

    def remaining(self) -> float | None:
        """Return the seconds left, never below 0; None for no end."""
        return None if self._expires is None else max(0.0, self._expires - time.monotonic())

    def cancel(self) -> None:
        """Say that the caller went away."""
        with self._lock:
            self._cancelled = True
            actions, self._on_cancel = self._on_cancel, []
        for action in actions:
            action()

    def on_cancel(self, action: Callable[[], object]) -> None:
        """Call ``action`` when the caller goes away, at once if it has gone."""
        with self._lock:
            if not self._cancelled:
                self._on_cancel.append(action)
                return
        action()

    def check(self) -> None:
        """Raise CancelledError or DeadlineExceededError where there is nobody left to answer."""
        if self._cancelled:
            raise CancelledError("the caller went away")
        if self.remaining() == 0.0:
            raise DeadlineExceededError("the deadline passed while the request was queued")
