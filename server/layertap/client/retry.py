"""Retries calls that a server refused because it is full."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from layertap.client.timeouts import Deadline
from layertap.errors import InvalidInputError, OverloadedError

__all__ = ["Retries", "check_retries", "retrying"]

R = TypeVar("R")

_FIRST_SECONDS = 0.5
_MOST_SECONDS = 8.0


def check_retries(retries: int) -> None:
    """Raise InvalidInputError for a number of retries below 0."""
    if retries < 0:
        raise InvalidInputError(f"retries: got {retries}, expected a number from 0")


class Retries:
    """Decides how often and when to retry; makes no calls and does not sleep.

    It waits for the time that the server specifies. If the server specifies none, it waits 0.5
    seconds, and twice as long before each further retry, up to 8 seconds. A random time of up to
    half of that is added, so that callers who were refused together don't retry together.

    Args:
        retries: Maximum number of retries.
        timeout: Seconds for all calls and waits together; None for no limit.
    """

    def __init__(self, retries: int, timeout: float | None) -> None:
        self._left = retries
        self._deadline = Deadline(timeout)
        self._backoff = _FIRST_SECONDS

    def remaining(self) -> float | None:
        """Return the seconds left for the next call; None for no limit."""
        return self._deadline.left()

    def pause(self, error: OverloadedError) -> float:
        """Return the seconds to wait before the next call.

        Raises:
            OverloadedError: ``error`` itself, after the last retry, if the server forbids a retry,
                or if the wait would exceed the timeout.
        """
        wanted = self._backoff if error.retry_after is None else error.retry_after
        self._backoff = min(2 * self._backoff, _MOST_SECONDS)
        seconds = wanted * random.uniform(1.0, 1.5)
        if not self._left or wanted < 0 or not self._deadline.within(seconds):
            raise error
        self._left -= 1
        return seconds


def retrying(
    call: Callable[[float | None], R],
    retries: int,
    timeout: float | None,
    sleep: Callable[[float], object] = time.sleep,
) -> R:
    """Make a call, and retry it while the server is full; see ``Retries``.

    Args:
        call: Makes the call, given the seconds that are left for it; None for no limit.
        retries: Maximum number of retries.
        timeout: Seconds for all calls and waits together; None for no limit.
        sleep: Waits for a number of seconds.

    Raises:
        OverloadedError: See ``Retries.pause``.
        LayertapError: Any other error of the call, without a retry.
    """
    allowed = Retries(retries, timeout)
    while True:
        try:
            return call(allowed.remaining())
        except OverloadedError as error:
            seconds = allowed.pause(error)
        sleep(seconds)
