"""Files with bearer tokens: one token per line; ``#`` starts a comment."""

from __future__ import annotations

import re
from pathlib import Path

from layertap.errors import ConfigError

__all__ = ["MIN_CHARACTERS", "check_token", "read_tokens"]

MIN_CHARACTERS = 16
"""Shorter ones could be guessed: nothing slows down somebody who tries."""

# b64token of RFC 6750, section 2.1. It has no '#', and nothing that a header can't carry.
_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")


def check_token(token: str, where: str) -> str:
    """Return the token; raise ConfigError, which does not show it, if it can't be one."""
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
    """Read a file's tokens.

    Args:
        file: The file.
        key: What named it, for the error's text.

    Raises:
        ConfigError: If it can't be read, or holds no token or something else. No error shows
            what the file holds.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{key}: {file}: {error.strerror}") from error
    except UnicodeDecodeError:
        # Without the cause, which holds the bytes.
        raise ConfigError(f"{key}: {file}: not UTF-8 text") from None
    stripped = ((number, line.partition("#")[0].strip()) for number, line in enumerate(lines, 1))
    tokens = [
        check_token(text, f"{key}: {file}, line {number}") for number, text in stripped if text
    ]
    if not tokens:
        raise ConfigError(f"{key}: {file}: got no token, expected one per line")
    return tuple(tokens)
