"""Messages name a few of many things, and say how many more there are."""

from __future__ import annotations

import pytest

from layertap.extraction import CapturePoint, PointKind
from layertap.extraction.plan import quoted
from layertap.listing import NAMED, listed
from layertap.selection import Capture


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, ""), (1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2 and 1 more"), (500, "0, 1, 2 and 497 more")],
)
def test_the_first_are_listed(count: int, expected: str) -> None:
    """All of them if there are few."""
    assert listed(map(str, range(count)), 3) == expected


def test_an_error_about_all_layers_is_short() -> None:
    """Each layer once, although its input is asked for as well."""
    points = [
        CapturePoint(PointKind.MODULE, f"features.{index}", capture)
        for index in range(400)
        for capture in (Capture.INPUT, Capture.OUTPUT)
    ]
    text = quoted(points)
    assert text.startswith("'features.0', 'features.1', ")
    assert text.endswith(f"and {400 - NAMED} more")
