"""Chooses one of several servers for each call; makes no calls itself.

Note [Several servers]
    A call goes to a server that has the fewest calls of this client. Servers that could not be
    used within the last second are chosen only if there is no other. Channels connect again by
    themselves, and as long as they can't, gRPC fails a call at once, so that the next server gets
    it without delay.

    A call is sent to another server if the first one is certainly not working on it: it could not
    be reached, it refused the call, or it ended the call because it is stopping. A call whose
    connection broke is not sent again. It may be what brought the server down, and would then bring
    down one server after another.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from layertap.addresses import may_be_several
from layertap.errors import LayertapError, OverloadedError, UnavailableError

__all__ = ["Attempts", "Balance"]

_AWAY_SECONDS = 1.0
"""How long a server that can't be used is avoided; clients connect again about as often."""

_NAME_TRIES = 4
"""Tries of a call whose target is a name that may stand for several servers."""


class Balance:
    """The calls of one client to several servers. Safe to share between threads.

    Args:
        targets: The servers' addresses.
    """

    def __init__(self, targets: Sequence[str]) -> None:
        self.targets = tuple(targets)
        self._lock = threading.Lock()
        self._calls = [0] * len(self.targets)
        self._away_until = [0.0] * len(self.targets)
        self._last = [0] * len(self.targets)
        self._count = 0

    def take(self, tried: Sequence[int] = ()) -> int:
        """Return the server for a call, which counts as running there until ``give_back``.

        Args:
            tried: Servers that have been tried already; one of the others is chosen.
        """
        now = time.monotonic()
        left = [index for index in range(len(self.targets)) if index not in tried]
        with self._lock:
            chosen = min(
                left or range(len(self.targets)),
                key=lambda index: (
                    self._away_until[index] > now,
                    self._calls[index],
                    self._last[index],
                ),
            )
            self._count += 1
            self._last[chosen] = self._count
            self._calls[chosen] += 1
        return chosen

    def give_back(self, index: int) -> None:
        """A call has ended."""
        with self._lock:
            self._calls[index] -= 1

    def avoid(self, index: int) -> None:
        """A server can't be used now."""
        with self._lock:
            self._away_until[index] = time.monotonic() + _AWAY_SECONDS

    def answers(self, index: int) -> None:
        """A server that could not be used can be used again."""
        with self._lock:
            self._away_until[index] = 0.0


class Attempts:
    """One call, which may be tried on several servers.

    Example:
        >>> attempts = Attempts(balance)
        >>> while True:
        ...     with attempts.server() as index:
        ...         try:
        ...             return call(index)
        ...         except LayertapError as error:
        ...             attempts.failed(error)

    Args:
        balance: The client's servers.
    """

    def __init__(self, balance: Balance) -> None:
        self._balance = balance
        self._index = 0
        self._tried: list[int] = []
        self._failures: list[tuple[int, LayertapError]] = []

    @contextmanager
    def server(self) -> Iterator[int]:
        """Choose the next server; the call counts as running there inside of the block."""
        self._index = self._balance.take(self._tried)
        try:
            yield self._index
        finally:
            self._balance.give_back(self._index)

    def failed(self, error: LayertapError) -> None:
        """Return if the call should be tried once more, on the next server.

        Raises:
            LayertapError: ``error`` itself if the call must not be sent again; after the last
                server, OverloadedError if one of them is only full, else UnavailableError, whose
                message has the errors of all servers.
        """
        if isinstance(error, UnavailableError) and error.refused:
            self._balance.avoid(self._index)
        elif not isinstance(error, OverloadedError):
            raise error
        self._tried.append(self._index)
        self._failures.append((self._index, error))
        if len(self._tried) == self._tries():
            raise self._summary()

    def _tries(self) -> int:
        """Return how often a call may be tried."""
        targets = self._balance.targets
        if len(targets) == 1 and may_be_several(targets[0]):
            return _NAME_TRIES
        return len(targets)

    def _summary(self) -> LayertapError:
        """Return the error for a call that no server took."""
        full = [error for _, error in self._failures if isinstance(error, OverloadedError)]
        if full:
            return min(full, key=_wait)
        if len(self._balance.targets) == 1:
            return self._failures[-1][1]
        words = "; ".join(f"{self._balance.targets[index]}: {e}" for index, e in self._failures)
        failure = UnavailableError(f"none of the servers can be used: {words}")
        failure.refused = True
        return failure


def _wait(error: OverloadedError) -> float:
    """Return the seconds until a retry, to find the shortest; infinite if a server forbids it."""
    seconds = error.retry_after or 0.0
    return math.inf if seconds < 0 else seconds
