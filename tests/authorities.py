"""Certificates for the tests, from their own certificate authorities, and token files."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

import trustme

EXTRACT = "extract-0123456789abcdef"
ADMIN = "admin-0123456789abcdef"
UNKNOWN = "nobody-0123456789abcdef"


@dataclass(frozen=True)
class Pair:
    """A certificate with its chain, and its key, in files."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority, and the folder for the files that it issues."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ca = trustme.CA()
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(self.file)

    def issue(self, *names: str, expired: bool = False) -> Pair:
        """Issue a certificate for hosts; with ``expired``, one that ended a day ago."""
        past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        cert = self._ca.issue_cert(*names, not_after=past if expired else None)
        stem = f"{names[0]}{'-expired' if expired else ''}-{len(list(self._folder.iterdir()))}"
        pair = Pair(self._folder / f"{stem}.pem", self._folder / f"{stem}.key")
        cert.private_key_pem.write_to_path(pair.key)
        pair.key.chmod(0o600)
        for index, part in enumerate(cert.cert_chain_pems):
            part.write_to_path(pair.certificate, append=bool(index))
        return pair


def token_file(file: Path, *tokens: str) -> Path:
    """Write tokens as an operator would."""
    file.write_text("# one a line\n" + "".join(f"{token}\n" for token in tokens), encoding="utf-8")
    file.chmod(0o600)
    return file
