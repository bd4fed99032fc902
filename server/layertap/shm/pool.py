"""The server's regions: made as they are needed, kept for reuse, all of them within a limit.

Reuse is what makes shared memory quick: pages that were written before are there already, in the
server and in the clients that have them mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import count

from layertap.shm.regions import Kind, Region, make_region

__all__ = ["Pool", "size_class"]

_LEAST_STEP = 64 * 1024
_WASTE = 2
# Each takes two open files, of 1024 that a process may have by default.
_REGIONS = 192


def size_class(nbytes: int) -> int:
    """Return the size of a new region for so many bytes: at most a quarter and 64 KiB more."""
    step = max(_LEAST_STEP, 1 << max(0, (nbytes - 1).bit_length() - 3))
    return -(-nbytes // step) * step


class Pool:
    """Regions that are lent and regions that wait for reuse. Not safe between threads.

    Args:
        limit: Bytes of all regions together, those included that clients still hold.
        dropped: Is told each region that will not be used again, just before it is closed.
        make: Makes a region, or raises OSError.

    Attributes:
        total: Bytes of all regions.
    """

    def __init__(
        self,
        limit: int,
        dropped: Callable[[Region], None],
        make: Callable[[int, Kind, int], Region] = make_region,
    ) -> None:
        self.total = 0
        self._made = 0
        self._limit = limit
        self._dropped = dropped
        self._make = make
        self._numbers = count(1)
        # In the order in which they were given back.
        self._free: dict[int, tuple[Region, float]] = {}

    @property
    def free_bytes(self) -> int:
        """Bytes of the regions that wait for reuse."""
        return sum(region.size for region, _ in self._free.values())

    @property
    def free_regions(self) -> int:
        """How many wait for reuse."""
        return len(self._free)

    def take(self, kind: Kind, nbytes: int, known: Collection[int] = ()) -> Region | None:
        """Return a region for so many bytes; None where the limit leaves no room for one.

        Args:
            kind: Which way the data goes. An input region is always a new one: whoever had an old
                one may still write to it.
            nbytes: What has to fit.
            known: Numbers of the regions that the client has mapped already: better than others.

        Raises:
            OSError: Where the system refuses to make one.
        """
        size = size_class(nbytes)
        # Of equals the one used last, which is most likely in the caches still.
        fitting = [
            region
            for region, _ in reversed(self._free.values())
            if kind is Kind.REPLY and region.size >= nbytes
        ]
        fitting.sort(key=lambda region: (region.number not in known, region.size))
        close = next((region for region in fitting if region.size <= _WASTE * size), None)
        full = self.total + size > self._limit or self._made >= _REGIONS
        if close is None and full:
            close = min(fitting, key=lambda region: region.size, default=None)
        if close is not None:
            del self._free[close.number]
            return close
        if not self._make_room(size):
            return None
        region = self._make(next(self._numbers), kind, size)
        self.total += region.size
        self._made += 1
        return region

    def give(self, region: Region, now: float) -> None:
        """Keep a reply region for reuse."""
        self._free[region.number] = (region, now)

    def drop(self, region: Region) -> None:
        """Let go of a region that is lent to nobody."""
        self.retire(region)
        self.settle(region.size)

    def retire(self, region: Region) -> None:
        """Let go of a region that a client still holds: its bytes count until ``settle``."""
        self._dropped(region)
        region.close()
        self._made -= 1

    def settle(self, nbytes: int) -> None:
        """Stop to count the bytes of a region that was retired."""
        self.total -= nbytes

    def reap(self, before: float) -> None:
        """Let go of the regions that nobody has used since."""
        for region, since in list(self._free.values()):
            if since < before:
                del self._free[region.number]
                self.drop(region)

    def _make_room(self, size: int) -> bool:
        """Let go of free regions, the longest unused first, until so many bytes fit."""
        if self.total - self.free_bytes + size > self._limit:
            return False
        if self._made - len(self._free) >= _REGIONS:
            return False
        while self.total + size > self._limit or self._made >= _REGIONS:
            number = next(iter(self._free))
            self.drop(self._free.pop(number)[0])
        return True
