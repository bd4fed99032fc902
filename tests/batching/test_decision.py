"""The rule by which measurements decide whether requests share passes."""

from __future__ import annotations

import pytest

from layertap.batching import LEAST_TURNS, MARGIN, MOST_TURNS, sharing_pays


def test_a_clear_gain_needs_the_least_turns() -> None:
    """Passes that are faster in every turn are shared as soon as there are enough turns."""
    ratios = [1.3] * LEAST_TURNS
    assert sharing_pays(ratios[:-1]) is None
    assert sharing_pays(ratios) is True


def test_a_clear_loss_needs_the_least_turns() -> None:
    """Passes that are slower in every turn are not shared, whatever was decided before."""
    ratios = [0.9] * LEAST_TURNS
    assert sharing_pays(ratios[:-1], before=True) is None
    assert [sharing_pays(ratios, before) for before in (None, False, True)] == [False] * 3


def test_one_disturbed_turn_does_not_decide() -> None:
    """A turn that something else on the machine disturbed is outvoted."""
    assert sharing_pays([1.3, 0.2, 1.3]) is None
    assert sharing_pays([1.3, 0.2, 1.3, 1.3]) is True
    assert sharing_pays([0.8, 4.0, 0.8]) is None
    assert sharing_pays([0.8, 4.0, 0.8, 0.8]) is False


@pytest.mark.parametrize(("before", "after"), [(None, False), (False, False), (True, True)])
@pytest.mark.parametrize("ratios", [[0.98, 1.04], [1.04, 0.98], [0.7, 1.5]])
def test_a_close_measurement_changes_nothing(before, after, ratios) -> None:
    """After the most turns the former decision stays; without one, requests run alone."""
    turns = (ratios * MOST_TURNS)[: MOST_TURNS - 1]
    assert sharing_pays(turns, before) is None
    assert sharing_pays([*turns, 1.0], before) is after


def test_beginning_to_share_needs_a_margin_and_going_on_does_not() -> None:
    """A gain below the margin keeps requests together, but does not bring them together."""
    small = (1 + MARGIN) / 2
    assert sharing_pays([small] * MOST_TURNS, before=False) is False
    assert sharing_pays([small] * MOST_TURNS) is False
    assert sharing_pays([small] * LEAST_TURNS, before=True) is True
    assert sharing_pays([MARGIN] * LEAST_TURNS) is True
