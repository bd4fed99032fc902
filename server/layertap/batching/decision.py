"""Decides from measurements whether requests share passes. Has no threads and no clock.

Note [When sharing pays]
    Both ways are measured in turns, and each turn gives the ratio of their rates, so that a machine
    whose speed drifts slows both alike. Requests begin to share passes if that is faster in three
    quarters of the turns, and by MARGIN in the middle one. They stop if it is slower in three
    quarters of the turns. In between, the measurement is close and the former decision stays; if
    there is none, each request runs alone, because its values are then exactly those of its own
    pass. So a decision does not alternate between two ways that are equally fast.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

__all__ = ["LEAST_TURNS", "MARGIN", "MOST_TURNS", "sharing_pays"]

LEAST_TURNS = 3
MOST_TURNS = 9

MARGIN = 1.05
"""How many times as many items a second shared passes must give before requests begin to share."""


def sharing_pays(ratios: Sequence[float], before: bool | None = None) -> bool | None:
    """Return whether requests should share passes; None if more turns are needed to tell.

    Args:
        ratios: For each turn so far, the items a second of shared passes as a multiple of those of
            single ones.
        before: The former decision; None if there is none.
    """
    turns = len(ratios)
    if turns < LEAST_TURNS:
        return None
    if 4 * sum(ratio < 1 for ratio in ratios) >= 3 * turns:
        return False
    mostly_faster = 4 * sum(ratio > 1 for ratio in ratios) >= 3 * turns
    if mostly_faster and (before or statistics.median(ratios) >= MARGIN):
        return True
    return None if turns < MOST_TURNS else bool(before)
