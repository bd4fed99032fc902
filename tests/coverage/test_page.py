"""Writing one section of the coverage page keeps the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from page import write_section


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
    with pytest.raises(ValueError, match="expected one of models, zoo, packages"):
        write_section(page, "other", "text")
    assert not page.exists()
