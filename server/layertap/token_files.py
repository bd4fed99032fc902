"""Files with bearer tokens: one token per line; ``#`` starts a comment."""

from __future__ import annotations

import re
from pathlib import Path

from layertap.errors import ConfigError

__all__ = ["MIN_CHARACTERS", "check_token", "read_tokens"]

MIN_CHARACTERS = 16
"""Shorter tokens could be guessed, as nothing slows down a caller who tries many."""

# b64token of RFC 6750, section 2.1. It contains no '#', and only what a header can contain.
_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")


def check_token(token: str, where: str) -> str:
    """Return the token; raise ConfigError, without quoting it, if it is malformed."""
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"{where}: got an invalid bearer token, expected letters, digits and "
            f"-._~+/ with = at the end only"
        )
    if len(token) < MIN_CHARACTERS:
        raise ConfigError(
            f"{where}: got a token of {len(token)} characters, expected {MIN_CHARACTERS} at least"
        )
    return token


def read_tokens(file: Path, key: str) -> tuple[str, ...]:
    """Return the tokens in a file.

    Args:
        file: The file.
        key: The setting that names the file, for the error message.

    Raises:
        ConfigError: If the file can't be read, has no token, or is malformed. No error quotes the
            file's content.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{key}: {file}: {error.strerror}") from error
    except UnicodeDecodeError:
        # Without the original error, which contains the bytes.
        raise ConfigError(f"{key}: {file}: not UTF-8 text") from None
    stripped = ((number, line.partition("#")[0].strip()) for number, line in enumerate(lines, 1))
    tokens = [
        check_token(text, f"{key}: {file}, line {number}") for number, text in stripped if text
    ]
    if not tokens:
        raise ConfigError(f"{key}: {file}: got no token, expected one per line")
    return tuple(tokens)
