"""The rule by which measurements in turns decide between two ways."""

from __future__ import annotations

import pytest

from layertap.turns import LEAST_TURNS, MARGIN, MOST_TURNS, other_pays


def test_a_clear_gain_needs_the_least_turns() -> None:
    """What is faster in every turn is taken as soon as there are enough turns."""
    ratios = [1.3] * LEAST_TURNS
    assert other_pays(ratios[:-1]) is None
    assert other_pays(ratios) is True


def test_a_clear_loss_needs_the_least_turns() -> None:
    """What is slower in every turn is left, whatever was decided before."""
    ratios = [0.9] * LEAST_TURNS
    assert other_pays(ratios[:-1], before=True) is None
    assert [other_pays(ratios, before) for before in (None, False, True)] == [False] * 3


def test_one_disturbed_turn_does_not_decide() -> None:
    """A turn that something else on the machine disturbed is outvoted."""
    assert other_pays([1.3, 0.2, 1.3]) is None
    assert other_pays([1.3, 0.2, *[1.3] * (MOST_TURNS - 3)]) is None
    assert other_pays([1.3, 0.2, *[1.3] * (MOST_TURNS - 2)]) is True
    assert other_pays([0.8, 4.0, 0.8]) is None
    assert other_pays([0.8, 4.0, 0.8, 0.8]) is False


@pytest.mark.parametrize(("before", "after"), [(None, False), (False, False), (True, True)])
@pytest.mark.parametrize("ratios", [[0.98, 1.04], [1.04, 0.98], [0.7, 1.5]])
def test_a_close_measurement_changes_nothing(before, after, ratios) -> None:
    """After the most turns the former decision stays; without one, the first way is kept."""
    turns = (ratios * MOST_TURNS)[: MOST_TURNS - 1]
    assert other_pays(turns, before) is None
    assert other_pays([*turns, 1.0], before) is after


def test_a_change_needs_a_margin_and_staying_does_not() -> None:
    """A gain below the margin keeps the other way, but does not bring a change to it."""
    small = (1 + MARGIN) / 2
    assert other_pays([small] * MOST_TURNS, before=False) is False
    assert other_pays([small] * MOST_TURNS) is False
    assert other_pays([small] * LEAST_TURNS, before=True) is True
    assert other_pays([MARGIN] * LEAST_TURNS) is True


def test_few_turns_must_all_show_the_gain() -> None:
    """A machine that others use makes one of two equal ways look faster for a while."""
    assert other_pays([1.3] * (MOST_TURNS - 2) + [1.01]) is None
    assert other_pays([1.3] * (MOST_TURNS - 2) + [1.01] * 2) is True


def test_the_margin_can_be_given() -> None:
    """A smaller one takes what the usual one leaves."""
    assert other_pays([1.04] * MOST_TURNS) is False
    assert other_pays([1.04] * LEAST_TURNS, margin=1.03) is True
