"""Calling again after a server refused a call because it is full."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from layertap.errors import InvalidInputError, OverloadedError

__all__ = ["check_retries", "retrying"]

R = TypeVar("R")

_FIRST_SECONDS = 0.5
_MOST_SECONDS = 8.0


def check_retries(retries: int) -> None:
    """Raise InvalidInputError for a number of retries below 0."""
    if retries < 0:
        raise InvalidInputError(f"retries: got {retries}, expected a number from 0")


def retrying(
    call: Callable[[float | None], R],
    retries: int,
    timeout: float | None,
    sleep: Callable[[float], object] = time.sleep,
) -> R:
    """Make a call, and again while the server refuses it because it is full.

    Waits as long as the server says; where it says nothing 0.5 seconds, and twice as long each
    further time up to 8. To that comes up to half as long again at random, so that callers who were
    refused together don't come back together.

    Args:
        call: Makes the call; gets the seconds that are left for it, None for no end.
        retries: How many times to call again at most.
        timeout: Seconds for all calls and waits together; None for no end.
        sleep: Waits so many seconds.

    Raises:
        OverloadedError: After the last retry, where the server says not to call again, and where
            the wait would outlast the timeout.
        LayertapError: Whatever else the call raises, at once.
    """
    ends = None if timeout is None else time.monotonic() + timeout
    backoff = _FIRST_SECONDS
    for left in range(retries, -1, -1):
        remaining = None if ends is None else max(0.0, ends - time.monotonic())
        try:
            return call(remaining)
        except OverloadedError as error:
            wanted = backoff if error.retry_after is None else error.retry_after
            backoff = min(2 * backoff, _MOST_SECONDS)
            seconds = wanted * random.uniform(1.0, 1.5)
            late = ends is not None and time.monotonic() + seconds >= ends
            if not left or late or wanted < 0:
                raise
        sleep(seconds)
    raise AssertionError("the last round returns or raises")
