"""The server's regions: made when they are needed, kept for reuse, and limited in total.

Reuse makes shared memory fast: pages that were written before are already mapped, in the server and
in the clients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import count

from layertap.shm.regions import Region, RegionKind, make_region

__all__ = ["MOST_REGIONS", "Pool", "size_class"]

_LEAST_STEP = 64 * 1024
_WASTE = 2
MOST_REGIONS = 192
"""Regions that a pool makes at most by default. Each takes two open files, and a process may have
1024 by default."""


def size_class(nbytes: int) -> int:
    """Return the size of a new region for ``nbytes``: at most a quarter and 64 KiB larger."""
    step = max(_LEAST_STEP, 1 << max(0, (nbytes - 1).bit_length() - 3))
    return -(-nbytes // step) * step


class Pool:
    """The regions that are lent and those that wait for reuse. Not safe to share between threads.

    Args:
        limit: Maximum bytes of all regions together, including those that clients still hold.
        dropped: Called with each region that won't be used again, just before it is closed.
        make: Makes a region, or raises OSError.
        regions: Maximum number of regions.

    Attributes:
        total: Bytes of all regions.
    """

    def __init__(
        self,
        limit: int,
        dropped: Callable[[Region], None],
        make: Callable[[int, RegionKind, int], Region] = make_region,
        *,
        regions: int = MOST_REGIONS,
    ) -> None:
        self.total = 0
        self._most = regions
        self._made = 0
        self._limit = limit
        self._dropped = dropped
        self._make = make
        self._numbers = count(1)
        # In the order of their return.
        self._free: dict[int, tuple[Region, float]] = {}

    @property
    def free_bytes(self) -> int:
        """The bytes of the regions that wait for reuse."""
        return sum(region.size for region, _ in self._free.values())

    @property
    def free_regions(self) -> int:
        """The number of regions that wait for reuse."""
        return len(self._free)

    def take(self, kind: RegionKind, nbytes: int, known: Collection[int] = ()) -> Region | None:
        """Return a region for ``nbytes``; None if the limit leaves no room for it.

        Args:
            kind: The direction of the data. An input region is always a new one, as the client
                that had an old one may still write to it.
            nbytes: The bytes that must fit.
            known: The numbers of the regions that the client has already mapped; preferred.

        Raises:
            OSError: If the system can't make a region.
        """
        size = size_class(nbytes)
        # Among equals prefer the one used last, which is most likely still in the CPU caches.
        fitting = [
            region
            for region, _ in reversed(self._free.values())
            if kind is RegionKind.REPLY and region.size >= nbytes
        ]
        fitting.sort(key=lambda region: (region.number not in known, region.size))
        close = next((region for region in fitting if region.size <= _WASTE * size), None)
        full = self.total + size > self._limit or self._made >= self._most
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
        """Close a region that is not lent."""
        self.retire(region)
        self.settle(region.size)

    def retire(self, region: Region) -> None:
        """Close a region that a client still holds; its bytes count until ``settle``."""
        self._dropped(region)
        region.close()
        self._made -= 1

    def settle(self, nbytes: int) -> None:
        """Stop counting the bytes of a region that was retired."""
        self.total -= nbytes

    def reap(self, before: float) -> None:
        """Close the free regions that were last used earlier than ``before``."""
        for region, since in list(self._free.values()):
            if since < before:
                del self._free[region.number]
                self.drop(region)

    def _make_room(self, size: int) -> bool:
        """Close free regions, the least recently used first, until ``size`` bytes fit."""
        if self.total - self.free_bytes + size > self._limit:
            return False
        if self._made - len(self._free) >= self._most:
            return False
        while self.total + size > self._limit or self._made >= self._most:
            number = next(iter(self._free))
            self.drop(self._free.pop(number)[0])
        return True
