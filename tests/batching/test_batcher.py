"""Which items run together, and which wait; time is just a number here."""

from __future__ import annotations

from layertap.batching import ALONE, Batcher, BatchPolicy
from layertap.batching.batcher import MAX_REMEMBERED

EIGHT = BatchPolicy(max_size=8)
PATIENT = BatchPolicy(max_size=8, max_delay=5.0)


def waiting(items: str, policy: BatchPolicy = EIGHT, key: object = "k") -> Batcher[str]:
    """Return a batcher with an item of size 1 for each letter, arriving at 0, 1, 2 and so on."""
    batcher: Batcher[str] = Batcher()
    for now, item in enumerate(items):
        batcher.add(item, key, 1, policy, now)
    return batcher


def served(batcher: Batcher[str], items: str, policy: BatchPolicy, now: float) -> None:
    """Let items of one key arrive and leave at one time."""
    for item in items:
        batcher.add(item, "k", 1, policy, now)
    assert batcher.take(now, at_once=True) == list(items)


def test_items_of_one_key_run_together_in_order() -> None:
    """Waiting items are taken at once, the oldest first, and none is left."""
    batcher = waiting("abc")
    assert batcher.take(now=2) == ["a", "b", "c"]
    assert batcher.take(now=2) == []
    assert len(batcher) == 0


def test_items_without_a_key_run_alone() -> None:
    """None is not a key that two items could share."""
    batcher = waiting("ab", key=None)
    assert [batcher.take(2), batcher.take(2)] == [["a"], ["b"]]


def test_a_policy_of_one_runs_each_alone() -> None:
    """The default policy joins nothing."""
    batcher = waiting("ab", ALONE)
    assert [batcher.take(2), batcher.take(2)] == [["a"], ["b"]]


def test_keys_do_not_mix_and_the_oldest_goes_first() -> None:
    """Batches are taken in the order of their oldest items."""
    batcher: Batcher[str] = Batcher()
    for now, (item, key) in enumerate(["ax", "by", "cx", "dy"]):
        batcher.add(item, key, 1, EIGHT, now)
    assert [batcher.take(4), batcher.take(4)] == [["a", "c"], ["b", "d"]]


def test_a_batch_is_no_larger_than_its_limit() -> None:
    """The sum of the sizes counts; an item that does not fit begins the next batch."""
    batcher: Batcher[str] = Batcher()
    for item, size in [("a", 3), ("b", 4), ("c", 2), ("d", 1)]:
        batcher.add(item, "k", size, EIGHT, 0)
    assert [batcher.take(0), batcher.take(0)] == [["a", "b"], ["c", "d"]]


def test_an_item_over_the_limit_runs_alone() -> None:
    """The engine's limits refuse a request; the batcher does not."""
    batcher: Batcher[str] = Batcher()
    batcher.add("large", "k", 9, EIGHT, 0)
    batcher.add("small", "k", 1, EIGHT, 0)
    assert [batcher.take(0), batcher.take(0)] == [["large"], ["small"]]


def test_a_lone_item_waits_for_nobody() -> None:
    """The last batch had no other item, so nothing is waited for, whatever the delay."""
    batcher = waiting("a", PATIENT)
    assert batcher.take(now=0) == ["a"]
    batcher.add("b", "k", 1, PATIENT, 0.1)
    assert batcher.take(now=0.1) == ["b"]


def test_where_three_were_served_three_are_waited_for() -> None:
    """A batch is held back until it has as many items as the last one, and no longer."""
    batcher: Batcher[str] = Batcher()
    served(batcher, "abc", PATIENT, now=0)
    for item in "de":
        batcher.add(item, "k", 1, PATIENT, 0.5)
    assert batcher.take(now=0.6) == []
    assert batcher.due(now=0.6) == 5.5
    batcher.add("f", "k", 1, PATIENT, 0.7)
    assert batcher.take(now=0.7) == ["d", "e", "f"]


def test_a_full_batch_waits_for_nobody() -> None:
    """It runs at once, even if the last batch had more items."""
    batcher: Batcher[str] = Batcher()
    served(batcher, "abcdefgh", PATIENT, now=0)
    small = BatchPolicy(max_size=2, max_delay=5.0)
    for item in "ij":
        batcher.add(item, "k", 1, small, 0.1)
    assert batcher.take(now=0.1) == ["i", "j"]


def test_the_delay_is_counted_from_the_oldest_item() -> None:
    """After the delay the items that are there run, and only as many are expected next time."""
    batcher: Batcher[str] = Batcher()
    quick = BatchPolicy(max_size=8, max_delay=0.25)
    served(batcher, "abc", quick, now=0)
    batcher.add("d", "k", 1, quick, 0.5)
    batcher.add("e", "k", 1, quick, 0.6)
    assert batcher.take(now=0.7) == []
    assert batcher.take(now=0.75) == ["d", "e"]
    for item in "fg":
        batcher.add(item, "k", 1, quick, 0.8)
    assert batcher.take(now=0.8) == ["f", "g"]


def test_after_a_quiet_second_nobody_is_expected() -> None:
    """The first item after a quiet time runs at once."""
    batcher: Batcher[str] = Batcher()
    served(batcher, "abc", PATIENT, now=0)
    batcher.add("d", "k", 1, PATIENT, 1.5)
    assert batcher.take(now=1.5) == ["d"]


def test_another_key_is_not_held_back() -> None:
    """While one batch waits for more items, batches behind it run."""
    batcher: Batcher[str] = Batcher()
    served(batcher, "abc", PATIENT, now=0)
    batcher.add("d", "k", 1, PATIENT, 0.1)
    batcher.add("x", None, 1, ALONE, 0.2)
    assert batcher.take(now=0.2) == ["x"]
    assert batcher.take(now=0.2) == []


def test_discarded_items_are_gone() -> None:
    """An item is found by identity, and removed only once."""
    batcher: Batcher[list[int]] = Batcher()
    mine, equal = [1], [1]
    for item in (mine, equal):
        batcher.add(item, "k", 1, EIGHT, 0)
    assert batcher.discard(mine)
    assert not batcher.discard(mine)
    (left,) = batcher.take(0)
    assert left is equal


def test_nothing_is_due_where_nothing_waits() -> None:
    """There is no time at which to wake up."""
    assert Batcher[str]().due(now=0) is None


def test_keys_that_wait_for_nobody_are_not_remembered() -> None:
    """However many of them run, a key whose batches are held back keeps what it has learnt."""
    batcher: Batcher[str] = Batcher()
    served(batcher, "ab", PATIENT, now=0)
    for key in range(MAX_REMEMBERED):
        batcher.add("x", key, 1, EIGHT, now=0.5)
        assert batcher.take(now=0.5) == ["x"]
    batcher.add("c", "k", 1, PATIENT, now=0.9)
    assert batcher.take(now=0.9) == []


def lengths(*sizes: int, policy: BatchPolicy) -> Batcher[str]:
    """Return a batcher with items of one key and these lengths, named by length and number."""
    batcher: Batcher[str] = Batcher()
    for now, length in enumerate(sizes):
        batcher.add(f"{length}-{now}", "k", 1, policy, now, length=length)
    return batcher


SIXTY_FOUR = BatchPolicy(max_size=8, max_tokens=64)


def test_items_of_similar_lengths_run_together_though_others_came_between() -> None:
    """The oldest item is joined by those nearest to its length; the others run after it."""
    batcher = lengths(10, 30, 11, 29, 9, policy=SIXTY_FOUR)
    assert batcher.take(9) == ["10-0", "11-2", "9-4"]
    assert batcher.take(9) == ["30-1", "29-3"]


def test_padding_counts_towards_the_tokens_of_a_batch() -> None:
    """Four items of 16 fill 64 tokens; a shorter one would be padded to 16 and not fit."""
    batcher = lengths(16, 16, 15, 16, 16, policy=SIXTY_FOUR)
    assert batcher.take(9) == ["16-0", "16-1", "16-3", "16-4"]
    assert batcher.take(9) == ["15-2"]


def test_a_batch_of_lengths_is_no_larger_than_its_limit_of_items() -> None:
    """The number of items is limited as well, however short they are."""
    batcher = lengths(1, 1, 1, 1, policy=BatchPolicy(max_size=3, max_tokens=64))
    assert [len(batcher.take(9)), len(batcher.take(9))] == [3, 1]


def test_a_short_item_does_not_wait_for_ever_behind_long_ones() -> None:
    """Whatever comes later, the oldest item is in the next batch."""
    batcher = lengths(3, 30, 30, policy=SIXTY_FOUR)
    assert batcher.take(9) == ["3-0"]


def test_a_long_item_above_the_budget_runs_alone() -> None:
    """An item with more tokens than a batch may have is not refused."""
    batcher = lengths(100, 100, policy=SIXTY_FOUR)
    assert [batcher.take(9), batcher.take(9)] == [["100-0"], ["100-1"]]


def test_little_of_a_batch_is_padding() -> None:
    """Items whose lengths differ too much run apart, even where the budget has room."""
    batcher = lengths(20, 10, policy=SIXTY_FOUR)
    assert [batcher.take(9), batcher.take(9)] == [["20-0"], ["10-1"]]
