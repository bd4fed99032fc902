"""A sample of ``make test-models``: every layer by every extractor equals the reference."""

from __future__ import annotations

import pytest
from prove import ORDER, Row, Tally, prove, table

from layertap.engine.contest import Entrant
from layertap.selection import Extractor

LONGER = [
    pytest.param(name, marks=pytest.mark.long)
    for name in ("shufflenet_v2_x0_5", "mobilenet_v3_small", "swin_t")
]


@pytest.mark.parametrize("name", ["squeezenet1_1", *LONGER])
def test_every_layer_equals_the_reference(name: str) -> None:
    """No extractor returns a wrong value for any layer, and HOOK serves all of them."""
    row = prove(name)
    assert row.error == ""
    assert {e: t.wrong for e, t in row.tallies.items() if t.wrong} == {}
    assert {e: t.failed for e, t in row.tallies.items() if t.failed} == {}
    assert row.tallies[Entrant(Extractor.HOOK)].right == row.layers
    assert row.tallies[Entrant(Extractor.FX)].right > 0
    assert row.tallies[Entrant(Extractor.CHILDREN)].right > 0


@pytest.mark.long
def test_a_detection_model_is_served_by_hooks() -> None:
    """A detector can't be traced symbolically, and takes a list; HOOK serves all its layers."""
    row = prove("ssdlite320_mobilenet_v3_large")
    assert row.error == ""
    assert row.tallies[Entrant(Extractor.HOOK)].wrong == []
    assert row.tallies[Entrant(Extractor.HOOK)].right > 300
    assert row.tallies[Entrant(Extractor.FX)].right == 0


def test_the_proof_can_fail() -> None:
    """A wrong value is counted, and shown in the table's last column."""
    row = Row("planted", (3, 8, 8), layers=1, tallies={e: Tally() for e in ORDER})
    row.tallies[Entrant(Extractor.FX)].wrong.append("layer1")
    assert table([row]).splitlines()[-1].endswith("| 1 |")
