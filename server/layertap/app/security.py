"""TLS, tokens, and warnings about what a server doesn't protect."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from layertap.addresses import is_loopback
from layertap.certificates import read_authorities, read_key_pair
from layertap.errors import ConfigError
from layertap.services.tokens import Right, Tokens
from layertap.settings import SecretFiles

__all__ = ["Security", "ServerTls", "open_security"]


class ServerTls:
    """The server's side of TLS, 1.2 or later.

    Args:
        certificate: PEM file with the server's certificate, then any intermediate certificates.
        private_key: PEM file with its private key, not encrypted.
        client_ca: PEM file with the CA certificates for clients; None to require no certificate.

    Raises:
        ConfigError: If a file can't be read, or the key doesn't belong to the certificate.
    """

    def __init__(self, certificate: Path, private_key: Path, client_ca: Path | None = None) -> None:
        self._certificate = certificate
        self._private_key = private_key
        self._client_ca = client_ca
        self._current = self._read()

    @property
    def mutual(self) -> bool:
        """Whether clients must present a certificate."""
        return self._client_ca is not None

    def reload(self) -> None:
        """Read the files again, for later handshakes.

        Raises:
            ConfigError: As for the constructor. Then the former certificates stay in use.
        """
        self._current = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Return the credentials for a port of a ``grpc.Server``."""
        given = self._current

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            """Return the new certificates if they changed; gRPC asks at every handshake."""
            nonlocal given
            if given is self._current:
                return None
            given = self._current
            return given

        return grpc.dynamic_ssl_server_credentials(
            given, renewed, require_client_authentication=self.mutual
        )

    def _read(self) -> grpc.ServerCertificateConfiguration:
        chain, secret = read_key_pair(self._certificate, self._private_key, "tls_cert", "tls_key")
        roots = read_authorities(self._client_ca, "tls_client_ca") if self._client_ca else None
        return grpc.ssl_server_certificate_configuration([(secret, chain)], roots)


@dataclass(frozen=True, slots=True)
class Security:
    """A server's encryption and authentication; the default is neither.

    Attributes:
        tls: TLS, or None for plain text.
        tokens: The tokens and their rights.
        exposed: Files with secrets that every user of this machine can read.
    """

    tls: ServerTls | None = None
    tokens: Tokens = field(default_factory=Tokens)
    exposed: tuple[Path, ...] = ()

    def reload(self) -> None:
        """Read certificates and tokens again, for new connections and calls.

        Raises:
            ConfigError: If a file can't be used. Certificates stay as they were if one of their
                files can't be used, and so do tokens.
        """
        try:
            if self.tls:
                self.tls.reload()
        finally:
            # A leaked token must become invalid even if the certificates can't be read.
            self.tokens.reload()

    def warnings(self, host: str, *, metrics: bool) -> Iterator[str]:
        """Return warnings about what a server that listens on ``host`` doesn't protect.

        Args:
            host: The address that the server listens on.
            metrics: Whether the metrics page is served on the same address.
        """
        for file in self.exposed:
            yield f"{file} holds a secret, and every user of this machine can read it; chmod 600"
        if is_loopback(host):
            return
        openly = self.tokens.right_without >= Right.EXTRACT and not (self.tls and self.tls.mutual)
        reached = f"{host} can be reached from other machines, and "
        if openly and self.tls is None:
            yield (
                f"{reached}anyone who can reach it may use it: there is no authentication and no "
                f"encryption"
            )
        elif openly:
            yield f"{reached}anyone who can reach it may use it: there is no authentication"
        if self.tokens.configured and self.tls is None:
            yield (
                f"{reached}tokens cross the network as plain text, where they can be read and "
                f"used: there is no encryption"
            )
        if metrics and (self.tls or not openly):
            yield f"{reached}the metrics page there has neither authentication nor encryption"


def open_security(files: SecretFiles, *, trusted: bool = False) -> Security:
    """Read the files of certificates and tokens.

    Args:
        files: The paths of the files.
        trusted: See ``Tokens``.

    Raises:
        ConfigError: If a file can't be used, or has no effect without another one.
    """
    tls = None
    if files.tls_cert and files.tls_key:
        tls = ServerTls(files.tls_cert, files.tls_key, files.tls_client_ca)
    elif files.tls_cert:
        raise ConfigError(f"tls_cert: {files.tls_cert}: got no tls_key with it, expected its key")
    elif files.tls_key:
        raise ConfigError(f"tls_key: {files.tls_key}: got no tls_cert, expected its certificate")
    elif files.tls_client_ca:
        raise ConfigError(
            f"tls_client_ca: {files.tls_client_ca}: got neither tls_cert nor tls_key, expected both"
        )
    secrets = (files.tls_key, files.extract_tokens_file, files.admin_tokens_file)
    return Security(
        tls,
        Tokens(files.extract_tokens_file, files.admin_tokens_file, trusted=trusted),
        tuple(file for file in secrets if file and file.stat().st_mode & stat.S_IROTH),
    )
