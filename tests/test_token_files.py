"""Token files are read, and errors never show their content."""

from __future__ import annotations

from pathlib import Path

import pytest

from authorities import EXTRACT
from layertap.errors import ConfigError
from layertap.token_files import read_tokens


def test_comments_and_empty_lines_are_no_tokens(tmp_path: Path) -> None:
    """A line has a token, a comment, both or nothing."""
    file = tmp_path / "tokens"
    file.write_text(f"# for CI\n\n  {EXTRACT}  # until March\r\nYWJjZGVmZ2hpamtsbW5vcA==\n")
    assert read_tokens(file, "k") == (EXTRACT, "YWJjZGVmZ2hpamtsbW5vcA==")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got no token"),
        (b"# nothing\n\n", "got no token"),
        (b"# one\nsecret word of mine\n", "line 2: got an invalid bearer token"),
        ("sécret-sécret-sécret".encode(), "line 1: got an invalid bearer token"),
        (b"secret", "line 1: got a token of 6 characters, expected 16 at least"),
        (b"secret\xff\xfe", "not UTF-8 text"),
    ],
)
def test_a_mistake_is_told_without_the_secret(tmp_path: Path, content: bytes, message: str) -> None:
    """The error names the key, the file and the line, but not the line's content."""
    file = tmp_path / "tokens"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_tokens(file, "extract_tokens_file")
    assert f"extract_tokens_file: {file}" in str(caught.value)
    assert message in str(caught.value)
    assert "cret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    """A missing file is an error with its key and name."""
    with pytest.raises(ConfigError, match=r"k: .*gone: No such file"):
        read_tokens(tmp_path / "gone", "k")
