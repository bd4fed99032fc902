"""Regions are made, reused and closed within the limit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layertap.shm.pool import Pool, size_class
from layertap.shm.regions import Region, RegionKind, supported

pytestmark = pytest.mark.skipif(not supported(), reason="shared memory is Linux's")

MIB = 1 << 20


class Dropped(list[int]):
    """The numbers of the regions that were dropped."""

    def __call__(self, region: Region) -> None:
        self.append(region.number)


@given(st.integers(1, 1 << 40))
def test_size_classes_waste_a_quarter_at_most(nbytes: int) -> None:
    """A region has at most a quarter and 64 KiB more than requested, in whole pages."""
    size = size_class(nbytes)
    assert nbytes <= size <= nbytes * 1.25 + 64 * 1024
    assert size % 4096 == 0
    assert size_class(size) == size


def test_smallest_that_fits_is_reused() -> None:
    """The smallest free region that fits is used, preferably one that the client has mapped."""
    pool = Pool(64 * MIB, Dropped())
    large, small, known = (pool.take(RegionKind.REPLY, n * MIB) for n in (5, 4, 6))
    for region in (large, small, known):
        pool.give(region, 0.0)
    assert pool.take(RegionKind.REPLY, 4 * MIB - 9, known=()) is small
    assert pool.take(RegionKind.REPLY, 4 * MIB, known={known.number}) is known
    assert pool.take(RegionKind.REPLY, 4 * MIB, known=()) is large
    assert pool.total == (5 + 4 + 6) * MIB


def test_small_reply_takes_no_huge_region_while_there_is_room() -> None:
    """A region of more than twice the size is reused only if the limit allows nothing else."""
    pool = Pool(17 * MIB, Dropped())
    huge = pool.take(RegionKind.REPLY, 16 * MIB)
    pool.give(huge, 0.0)
    small = pool.take(RegionKind.REPLY, MIB)
    assert small.size == MIB
    assert pool.take(RegionKind.REPLY, MIB) is huge
    assert pool.take(RegionKind.REPLY, MIB) is None


def test_limit_holds_and_free_regions_make_room() -> None:
    """Free regions are closed, the least recently used first, if bytes are needed; lent never."""
    dropped = Dropped()
    pool = Pool(16 * MIB, dropped)
    first, second, third = (pool.take(RegionKind.REPLY, 4 * MIB) for _ in range(3))
    pool.give(first, 0.0)
    pool.give(second, 1.0)
    assert pool.take(RegionKind.REPLY, 16 * MIB) is None
    assert dropped == []
    assert pool.take(RegionKind.REPLY, 8 * MIB).size == 8 * MIB
    assert dropped == [first.number]
    assert pool.total == 16 * MIB
    assert pool.take(RegionKind.REPLY, 4 * MIB) is second
    assert pool.take(RegionKind.REPLY, 4 * MIB) is None
    assert third.size == 4 * MIB


def test_input_regions_are_never_reused() -> None:
    """An input region is always new, and never a free one."""
    pool = Pool(16 * MIB, Dropped())
    pool.give(pool.take(RegionKind.REPLY, MIB), 0.0)
    numbers = {pool.take(RegionKind.INPUT, MIB).number for _ in range(3)}
    assert len(numbers) == 3
    assert pool.free_regions == 1


def test_unused_regions_are_let_go_of() -> None:
    """Reaping closes exactly the regions that were not used since."""
    dropped = Dropped()
    pool = Pool(16 * MIB, dropped)
    old, new = pool.take(RegionKind.REPLY, MIB), pool.take(RegionKind.REPLY, MIB)
    pool.give(old, 1.0)
    pool.give(new, 2.0)
    pool.reap(1.5)
    assert dropped == [old.number]
    assert (pool.free_regions, pool.free_bytes, pool.total) == (1, MIB, MIB)


def test_retired_bytes_count_until_they_are_settled() -> None:
    """A region that a client may still read counts until it is given back."""
    pool = Pool(4 * MIB, Dropped())
    region = pool.take(RegionKind.REPLY, 4 * MIB)
    pool.retire(region)
    assert pool.take(RegionKind.REPLY, MIB) is None
    pool.settle(region.size)
    assert pool.take(RegionKind.REPLY, MIB) is not None


def test_regions_are_few_enough_for_their_files() -> None:
    """A pool has at most so many regions, as each takes two files; it closes free ones."""
    dropped = Dropped()
    pool = Pool(1024 * MIB, dropped, regions=12)
    regions = [pool.take(RegionKind.REPLY, 1000) for _ in range(12)]
    assert pool.take(RegionKind.REPLY, 1000) is None
    pool.give(regions[7], 0.0)
    pool.give(regions[9], 0.0)
    assert pool.take(RegionKind.INPUT, 1000) is not None
    assert dropped == [regions[7].number]
    assert pool.take(RegionKind.REPLY, MIB) is not None
    assert dropped == [regions[7].number, regions[9].number]
    pool.retire(regions[0])
    assert pool.take(RegionKind.REPLY, MIB) is not None
    for region in regions:
        if region not in (regions[0], regions[7], regions[9]):
            pool.drop(region)
