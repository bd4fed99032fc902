"""A pass spec identifies what a pass does."""

from __future__ import annotations

import dataclasses

import pytest

from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.plan import PlanKey
from layertap.extraction.points import CapturePoint, PointKind
from layertap.selection import Capture, Extractor

CONV = CapturePoint(PointKind.MODULE, "conv")
GIVEN = CapturePoint(PointKind.MODULE, "conv", Capture.INPUT)
NODE = CapturePoint(PointKind.NODE, "add")


def test_equal_specs_find_one_plan() -> None:
    """Specs with the same points are one key; other points or another order are another."""
    plans = {PlanKey(Extractor.HOOK, PassSpec((CONV, GIVEN)), (3, 8, 8)): "plan"}
    assert PlanKey(Extractor.HOOK, PassSpec((CONV, GIVEN)), (3, 8, 8)) in plans
    for points in ((GIVEN, CONV), (CONV,), (CONV, GIVEN, NODE)):
        assert PlanKey(Extractor.HOOK, PassSpec(points), (3, 8, 8)) not in plans
    assert PlanKey(Extractor.FX, PassSpec((CONV, GIVEN)), (3, 8, 8)) not in plans


def test_every_field_of_a_spec_is_part_of_keys_and_of_file_names() -> None:
    """A field that a later version adds is compared, hashed and shown automatically."""

    @dataclasses.dataclass(frozen=True, slots=True)
    class Later(PassSpec):
        edits: tuple[str, ...] = ()
        __hash__ = PassSpec.__hash__

    plain, edited = Later((CONV,)), Later((CONV,), ("zero",))
    assert plain != edited
    assert hash(plain) != hash(edited)
    assert repr(plain) != repr(edited)


def test_hooks_see_modules_only() -> None:
    """With one node among the points, the spec is no longer one of modules only."""
    assert PassSpec((CONV, GIVEN)).modules_only
    assert not PassSpec((CONV, NODE)).modules_only


def test_a_spec_can_not_be_changed() -> None:
    """It is a key, so assigning to a field raises."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        PassSpec((CONV,)).points = ()  # type: ignore[misc]
