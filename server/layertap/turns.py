"""Decides from measurements in turns which of two ways is faster. Has no threads and no clock.

Note [When another way pays]
    Both ways are measured in turns, and each turn gives the ratio of their rates, so that a machine
    whose speed drifts slows both alike. The other way is taken if it is faster in three quarters of
    MOST_TURNS turns, and by MARGIN in the middle one; after fewer turns, only if each of them shows
    it faster by MARGIN. It is left if it is slower in three quarters of the turns. In between, the
    measurement is close and the former decision stays; if there is none, the first way is kept. So
    a decision does not alternate between two ways that are equally fast.

    On machines that are shared with others, turns scatter by 10 %. Of two ways that are equally
    fast, the other one is then taken in 11 of 100 cases, and in 2 of 100 if it is slower by 5 %
    (simulated). If three turns could decide by their middle one, it would be 28 and 7 of 100.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

__all__ = ["LEAST_TURNS", "MARGIN", "MOST_TURNS", "other_pays"]

LEAST_TURNS = 3
MOST_TURNS = 9

MARGIN = 1.05
"""How many times as fast the other way must be before it is taken."""


def other_pays(
    ratios: Sequence[float], before: bool | None = None, *, margin: float = MARGIN
) -> bool | None:
    """Return whether the other way should be taken; None if more turns are needed to tell.

    Args:
        ratios: For each turn so far, the rate of the other way as a multiple of the first one's.
        before: The former decision; None if there is none.
        margin: How many times as fast it must be to be taken.
    """
    turns = len(ratios)
    if turns < LEAST_TURNS:
        return None
    if 4 * sum(ratio < 1 for ratio in ratios) >= 3 * turns:
        return False
    mostly_faster = 4 * sum(ratio > 1 for ratio in ratios) >= 3 * turns
    if (mostly_faster and before) or min(ratios) >= margin:
        return True
    if turns < MOST_TURNS:
        return None
    return bool(before) or (mostly_faster and statistics.median(ratios) >= margin)
