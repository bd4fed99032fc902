"""Each token has the right of its file; several are valid at once, and they can be replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from authorities import ADMIN, EXTRACT, UNKNOWN, token_file
from layertap.errors import ConfigError
from layertap.services.tokens import Right, Tokens


def test_every_token_of_a_file_has_its_right(tmp_path: Path) -> None:
    """All lines of a file are valid at once; any other text, however similar, has no right."""
    extract = token_file(tmp_path / "e", "first-0123456789abcdef", EXTRACT)
    tokens = Tokens(extract, token_file(tmp_path / "a", ADMIN))
    assert tokens.right_of("first-0123456789abcdef") is Right.EXTRACT
    assert tokens.right_of(EXTRACT) is Right.EXTRACT
    assert tokens.right_of(ADMIN) is Right.ADMIN
    for wrong in (UNKNOWN, "", EXTRACT[:-1], EXTRACT + "x", EXTRACT.upper(), "é", "\udcff"):
        assert tokens.right_of(wrong) is Right.NONE


@pytest.mark.parametrize(
    ("extract", "admin", "without"),
    [
        (False, False, Right.EXTRACT),
        (True, False, Right.NONE),
        (False, True, Right.EXTRACT),
        (True, True, Right.NONE),
    ],
)
def test_what_needs_no_token(tmp_path: Path, extract: bool, admin: bool, without: Right) -> None:
    """Without a token one may extract unless a file forbids it, and never administrate."""
    tokens = Tokens(
        token_file(tmp_path / "e", EXTRACT) if extract else None,
        token_file(tmp_path / "a", ADMIN) if admin else None,
    )
    assert tokens.right_without is without


@pytest.mark.parametrize("files", [(), ("e",), ("a",), ("e", "a")])
def test_trust_holds_only_while_there_are_no_tokens(tmp_path: Path, files: tuple[str, ...]) -> None:
    """If every caller is trusted but there are tokens, the tokens' rules apply."""
    extract = token_file(tmp_path / "e", EXTRACT) if "e" in files else None
    admin = token_file(tmp_path / "a", ADMIN) if "a" in files else None
    without = Tokens(extract, admin, trusted=True).right_without
    assert without is (Tokens(extract, admin).right_without if files else Right.ADMIN)


def test_reload_replaces_the_tokens(tmp_path: Path) -> None:
    """During a rotation both tokens are valid; afterwards the old one is not."""
    file = token_file(tmp_path / "e", EXTRACT)
    tokens = Tokens(file)
    new = "renewed-0123456789abcdef"
    seen = []
    for content in ((EXTRACT, new), (new,)):
        token_file(file, *content)
        tokens.reload()
        seen.append((tokens.right_of(EXTRACT), tokens.right_of(new)))
    assert seen == [(Right.EXTRACT, Right.EXTRACT), (Right.NONE, Right.EXTRACT)]


def test_a_reload_that_fails_changes_nothing(tmp_path: Path) -> None:
    """A damaged file neither refuses valid tokens nor admits others."""
    file = token_file(tmp_path / "e", EXTRACT)
    tokens = Tokens(file)
    file.write_text("")
    with pytest.raises(ConfigError, match="got no token"):
        tokens.reload()
    file.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        tokens.reload()
    assert tokens.right_of(EXTRACT) is Right.EXTRACT
    assert tokens.right_without is Right.NONE


def test_a_token_in_both_files_is_refused(tmp_path: Path) -> None:
    """A token for extraction must not allow administration by mistake."""
    extract = token_file(tmp_path / "e", EXTRACT)
    with pytest.raises(ConfigError, match=r"admin_tokens_file: .*a token of it is in") as caught:
        Tokens(extract, token_file(tmp_path / "a", ADMIN, EXTRACT))
    assert EXTRACT not in str(caught.value)
