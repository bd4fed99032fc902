"""Writing one section of the coverage page keeps the others, and so do runs keep their rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest
import torch
from gradient_subjects import GradientSubject
from page import write_section
from runs import Command


@dataclass
class Row:
    """What became of a model."""

    model: str
    group: str
    wrong: list[str] = field(default_factory=list)
    error: str = ""


def test_a_section_takes_its_own_place(tmp_path: Path) -> None:
    """A section that is written again replaces its former text only."""
    page = tmp_path / "coverage.md"
    write_section(page, "zoo", "## Zoo\n\nold")
    write_section(page, "models", "## Models\n\n| a |\n| --- |")
    write_section(page, "zoo", "## Zoo\n\nnew")
    text = page.read_text("utf-8")
    assert text.startswith("# Coverage\n")
    assert text.index("## Models") < text.index("## Zoo")
    assert "| a |\n| --- |" in text
    assert "new" in text
    assert "old" not in text


def test_a_section_of_no_place_is_refused(tmp_path: Path) -> None:
    """An unknown section is an error, and nothing is written."""
    page = tmp_path / "coverage.md"
    with pytest.raises(ValueError, match="expected one of models, channels_last, export, zoo"):
        write_section(page, "other", "text")
    assert not page.exists()


def nets() -> list[GradientSubject]:
    net = GradientSubject("net", "own", torch.nn.Identity, (1,), torch.ones(2, 1))
    return [replace(net, name=name) for name in ("right", "wrong", "failed", "new")]


def prove(subject: GradientSubject, device: str) -> Row:
    return Row(subject.name, subject.group)


def section(rows: Sequence[Row], totals: Mapping[str, int]) -> str:
    return f"{sorted(row.model for row in rows)} of {totals}"


def words(row: Row) -> str:
    return row.model


def test_rows_are_kept_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run goes on where one stopped; wrong, failed and named models are tried again."""
    file, page = tmp_path / "rows.json", tmp_path / "coverage.md"
    rows = [Row("right", "own"), Row("wrong", "own", ["a"]), Row("failed", "own", error="ended")]
    file.write_text(json.dumps([asdict(row) for row in rows]), "utf-8")
    command = Command("zoo", "", {"own": nets}, Row, prove, section, words)
    for named, expected in ((), ["wrong", "failed", "new"]), (("right",), ["right"]):
        monkeypatch.setattr("sys.argv", ["", *named, "--rows", str(file), "--write", str(page)])
        assert command.run() == 0
        assert capsys.readouterr().out.splitlines()[:-1] == expected
    monkeypatch.setattr("sys.argv", ["", "new", "--rows", str(file)])
    file.write_text(json.dumps([asdict(row) for row in rows]), "utf-8")
    assert command.run() == 1  # What was wrong stays until it is tried again.
    assert len(json.loads(file.read_text("utf-8"))) == 4
    assert "['failed', 'new', 'right', 'wrong'] of {'own': 4}" in page.read_text("utf-8")
