"""PEM files for TLS, checked when they are read.

gRPC reports a file that won't do at the first handshake, to the other side, and without its name.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from layertap.errors import ConfigError

__all__ = ["read_authorities", "read_key_pair"]


def read_authorities(file: Path, key: str) -> bytes:
    """Return the certificates of authorities that may vouch for the other side.

    Args:
        file: A PEM file with one certificate or more.
        key: What named it, for the error's text.

    Raises:
        ConfigError: If it can't be read or holds no certificate.
    """
    content = _read(file, key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=file)
    except (ssl.SSLError, OSError):
        raise ConfigError(f"{key}: {file}: got no certificate, expected some in PEM") from None
    return content


def read_key_pair(
    certificate: Path, private_key: Path, certificate_key: str, private_key_key: str
) -> tuple[bytes, bytes]:
    """Return (certificate chain, private key).

    Args:
        certificate: A PEM file: the certificate of this side, then those between it and the
            authority.
        private_key: A PEM file with the certificate's key, not encrypted.
        certificate_key: What named the first, for the error's text.
        private_key_key: What named the second.

    Raises:
        ConfigError: If either can't be read, or the key is not the certificate's.
    """
    chain, secret = _read(certificate, certificate_key), _read(private_key, private_key_key)
    if b"ENCRYPTED" in secret:
        raise ConfigError(
            f"{private_key_key}: {private_key}: the key is encrypted; expected one without a "
            f"passphrase, in a file that only the server may read"
        )
    # What is not a certificate is told apart from a key that does not match.
    read_authorities(certificate, certificate_key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, private_key)
    except (ssl.SSLError, OSError) as error:
        mismatch = isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH"
        got = "is not the key of the certificate in" if mismatch else "holds no key in PEM for"
        raise ConfigError(f"{private_key_key}: {private_key}: {got} {certificate}") from None
    return chain, secret


def _read(file: Path, key: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: {file}: {error.strerror}") from error
