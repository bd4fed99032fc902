"""A sample of ``make test-export`` and ``make test-channels-last``, and their tables."""

from __future__ import annotations

import shutil

import prove
import prove_channels_last
import pytest
from one_extractor import Named, Row, prove_layers, section
from prove import Tally
from prove_export import ENTRANT, HEADER


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not shutil.which("g++"), reason="a package is compiled with g++, which is not here"
)
def test_every_layer_equals_the_reference() -> None:
    """One package has all layers of a real model, and their inputs."""
    row = prove_layers(ENTRANT, Named("squeezenet1_1", "torchvision"), "cpu")
    assert (row.error, row.wrong, row.unbuilt, row.refused) == ("", [], [], {})
    assert row.right == row.layers == 68
    assert row.values == 135


def test_every_layer_with_channels_last_equals_the_reference() -> None:
    """One program has all layers of a real model, and their inputs."""
    row = prove_layers(prove_channels_last.ENTRANT, Named("squeezenet1_1", "torchvision"), "cpu")
    assert (row.error, row.wrong, row.unbuilt, row.refused) == ("", [], [], {})
    assert row.right == row.layers == 68
    assert row.values == 135


@pytest.mark.long
def test_a_detector_is_refused_with_the_reason() -> None:
    """A model that takes a list of images can't be exported; nothing is compiled for it."""
    row = prove_layers(ENTRANT, Named("ssdlite320_mobilenet_v3_large", "torchvision"), "cpu")
    assert (row.right, row.error) == (0, "")
    [(why, count)] = row.refused.items()
    assert "takes a list of images" in why
    assert count > 300


def test_the_table_tells_what_was_wrong_and_refused() -> None:
    """Wrong values are counted at the top and in the row; reasons are in the row."""
    rows = [
        Row("a", "torchvision", [3, 8, 8], 4, 8, 1, {"its code branches": 2}, [], ["x", "y"]),
        Row("b", "timm", [3, 8, 8], 1, 0, 0, {}, ["not exported"]),
        Row("c", "timm", error="no size"),
    ]
    text = section(HEADER, rows, {"torchvision": 2})
    assert "1 models of torchvision (of 2) and 1 models of timm: 8 values" in text
    assert "1 layers right, **2 wrong**" in text
    assert text.splitlines()[-3:] == [
        "| a | 3×8×8 | 4 | 1 | 2: its code branches | 2 |",
        "| b | 3×8×8 | 1 | 0 | not exported | 0 |",
        "| c | – | – | – | – | no size |",
    ]


def test_a_wrong_value_of_a_package_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although a server would refuse such a package, and so it is not wrong in the first table."""
    tally = Tally(compared=2, right=1, failed="refused when built: x: 1e-01", off=["x: 1e-01"])
    found = prove.Row("a", (3, 8, 8), layers=2, tallies={ENTRANT: tally})
    monkeypatch.setattr(prove, "quietly", lambda *given: found)
    row = prove_layers(ENTRANT, Named("a", "torchvision"), "cpu")
    assert row.wrong == ["x: 1e-01"]
    assert "**1 wrong**" in section(HEADER, [row], {})
