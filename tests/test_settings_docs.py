"""Documentation of settings agrees with their declarations."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from layertap.settings import Limits, ServedModel, ServerOptions, definitions

ROOT = Path(__file__).resolve().parent.parent
DECLARED = [each for owner in (ServerOptions, Limits, ServedModel) for each in definitions(owner)]


def test_the_page_of_settings_is_generated() -> None:
    """docs/settings.md equals the text made from the declarations."""
    spec = importlib.util.spec_from_file_location("gen", ROOT / "tools" / "gen_settings.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert (ROOT / "docs" / "settings.md").read_text("utf-8") == tool.page(), "run make gen"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_rows_with_a_key_and_a_flag_are_right(page: Path) -> None:
    """If a hand-written table names a key and a flag, the flag is that key's."""
    flags = {(each.key, each.flag) for each in DECLARED}
    rows = re.compile(r"^\| `(\w+)` \| `--(?:no-)?([a-z0-9-]+)", re.MULTILINE)
    written = {(key, f"--{flag}") for key, flag in rows.findall(page.read_text("utf-8"))}
    assert written - flags == set()
