"""PEM files for TLS, checked when they are read.

gRPC reports an unusable file only at the first handshake, to the peer, and without its name.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from layertap.errors import ConfigError

__all__ = ["read_authorities", "read_key_pair"]


def read_authorities(file: Path, key: str) -> bytes:
    """Return the CA certificates that are used to verify the peer.

    Args:
        file: A PEM file with one or more certificates.
        key: The setting or argument that names the file, for the error message.

    Raises:
        ConfigError: If the file can't be read or has no certificate.
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
        certificate: A PEM file with this side's certificate, then any intermediate certificates.
        private_key: A PEM file with the certificate's private key, not encrypted.
        certificate_key: The setting that names the first file, for the error message.
        private_key_key: The setting that names the second file.

    Raises:
        ConfigError: If either can't be read, or the key doesn't belong to the certificate.
    """
    chain, secret = _read(certificate, certificate_key), _read(private_key, private_key_key)
    if b"ENCRYPTED" in secret:
        raise ConfigError(
            f"{private_key_key}: {private_key}: the key is encrypted; expected one without a "
            f"passphrase, in a file that only the server may read"
        )
    # Checked first, so that a bad certificate is not reported as a key that doesn't match.
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
