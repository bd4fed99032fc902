"""The rights of bearer tokens."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from layertap.errors import ConfigError
from layertap.token_files import read_tokens

__all__ = ["ADMIN_KEY", "EXTRACT_KEY", "Right", "Tokens"]

EXTRACT_KEY = "extract_tokens_file"
ADMIN_KEY = "admin_tokens_file"


class Right(IntEnum):
    """What a caller may do. A higher right includes the lower ones."""

    NONE = 0
    EXTRACT = 1
    ADMIN = 2


@dataclass(frozen=True, slots=True)
class _Known:
    """The content of the files: each token's digest and right."""

    rights: tuple[tuple[bytes, Right], ...]


class Tokens:
    """The tokens of a server, read from files. Safe to share between threads.

    Several tokens are valid at once, so a token can be replaced without refusing any call: add the
    new token, ``reload``, let the clients change to it, remove the old token, ``reload``.

    Args:
        extract_file: Tokens that may extract and describe. If None, every caller may.
        admin_file: Tokens that may also administrate. If None, no caller may.
        trusted: Whether every caller may administrate if neither file is given. Only for servers
            that were started with this option and that only this machine can reach.

    Raises:
        ConfigError: If a file can't be read or is malformed, or if a token is in both files.
    """

    def __init__(
        self,
        extract_file: Path | None = None,
        admin_file: Path | None = None,
        *,
        trusted: bool = False,
    ) -> None:
        self._extract_file = extract_file
        self._admin_file = admin_file
        self._trusted = trusted
        self._known = self._read()

    @property
    def configured(self) -> bool:
        """Whether any tokens are configured."""
        return self._extract_file is not None or self._admin_file is not None

    @property
    def right_without(self) -> Right:
        """The right of a caller without a token."""
        if self._extract_file is not None:
            return Right.NONE
        return Right.ADMIN if self._trusted and self._admin_file is None else Right.EXTRACT

    def right_of(self, token: str) -> Right:
        """Return a token's right; NONE for an unknown token.

        This takes the same time for every token: it is compared with all known tokens, by digest,
        so that a caller can measure neither a common prefix nor a length.
        """
        digest = _digest(token)
        found = Right.NONE
        for known, right in self._known.rights:
            if hmac.compare_digest(known, digest):
                found = right
        return found

    def reload(self) -> None:
        """Read the files again.

        Raises:
            ConfigError: As for the constructor. Then the former tokens stay valid.
        """
        self._known = self._read()

    def _read(self) -> _Known:
        extract = _tokens(self._extract_file, EXTRACT_KEY)
        admin = _tokens(self._admin_file, ADMIN_KEY)
        if set(extract) & set(admin):
            raise ConfigError(
                f"{ADMIN_KEY}: {self._admin_file}: a token of it is in {self._extract_file} too; "
                f"admin tokens may also extract, and extract tokens must not allow administration"
            )
        return _Known(
            tuple((_digest(token), Right.EXTRACT) for token in extract)
            + tuple((_digest(token), Right.ADMIN) for token in admin)
        )


def _tokens(file: Path | None, key: str) -> tuple[str, ...]:
    return () if file is None else read_tokens(file, key)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
