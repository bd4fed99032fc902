"""Options of the commands that call a server: its address, TLS and a token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from layertap.client import Client

__all__ = ["ServerAddress", "connection_options"]

F = TypeVar("F", bound=Callable[..., Any])

_FILE = click.Path()


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """The server named on the command line, and how to connect to it.

    Attributes:
        target: Its address.
        tls: Whether to use TLS; each of the next four implies it.
        ca: PEM file with the CA certificate that verifies the server.
        cert: PEM file with the client's certificate.
        key: PEM file with the private key of ``cert``.
        server_name: The name that the server's certificate must have.
        token_file: File whose first token is sent as the bearer token.
        allow_plaintext_token: Whether the token may be sent to another machine without TLS.
    """

    target: str
    tls: bool = False
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    server_name: str | None = None
    token_file: str | None = None
    allow_plaintext_token: bool = False

    def client(self, timeout: float = 60.0) -> Client:
        """Return a client; the caller must close it.

        Args:
            timeout: Seconds that a call may take.

        Raises:
            ConfigError: If a file can't be used, or the token would be sent without TLS.
        """
        from layertap.client import Client, Tls, read_token

        tls = self.tls or any((self.ca, self.cert, self.key, self.server_name))
        return Client(
            self.target,
            timeout=timeout,
            tls=tls and Tls(self.ca, self.cert, self.key, self.server_name or ""),
            token=read_token(self.token_file) if self.token_file else None,
            allow_plaintext_token=self.allow_plaintext_token,
        )


def connection_options(default: str | None = None, *, several: bool = False) -> Callable[[F], F]:
    """Return a decorator that adds ``--server`` and its related options to a command.

    Args:
        default: The server to call if none is named; None if the command also works without one.
        several: Whether ``--server`` may be given several times.

    Returns:
        A decorator. The command gets ``server``: a ServerAddress, or None without a default; or
        ``servers``, a list of them, if there may be several.
    """

    def decorate(function: F) -> F:
        verb: Any = _with_connection(function, several)
        for option in reversed((_server_option(default, several), *_OPTIONS)):
            verb = option(verb)
        return verb  # type: ignore[no-any-return] # the same function, to click

    return decorate


def _with_connection(function: Callable[..., Any], several: bool) -> Callable[..., Any]:
    names = [field.name for field in fields(ServerAddress) if field.name != "target"]

    @functools.wraps(function)
    def verb(*args: Any, server: str | tuple[str, ...] | None, **flags: Any) -> Any:
        given = {name: flags.pop(name) for name in names}
        targets = [server] if isinstance(server, str) else server or ()
        if not targets:
            extra = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
            if extra:
                raise click.UsageError(f"{', '.join(extra)}: only together with --server")
        addresses = [ServerAddress(target, **given) for target in targets]
        if several:
            return function(*args, servers=addresses, **flags)
        return function(*args, server=addresses[0] if addresses else None, **flags)

    return verb


def _server_option(default: str | None, several: bool) -> Callable[[F], F]:
    text = (
        f"The server to call. Default: {default}."
        if default
        else "Call this server instead of loading MODEL in this process."
    )
    if several:
        text += " May be given several times: the servers share the work."
    return click.option(
        "--server", metavar="HOST:PORT", default=default, multiple=several, help=text
    )


_OPTIONS = (
    click.option(
        "--tls",
        is_flag=True,
        help="Connect with TLS; verify the server with gRPC's list of public CAs.",
    ),
    click.option(
        "--ca",
        type=_FILE,
        metavar="PEM",
        help="CA certificate used to verify the server; implies --tls.",
    ),
    click.option(
        "--cert",
        type=_FILE,
        metavar="PEM",
        help="Client certificate, for servers that ask for one; implies --tls.",
    ),
    click.option("--key", type=_FILE, metavar="PEM", help="Private key of --cert."),
    click.option(
        "--server-name",
        metavar="NAME",
        help="The name that the server's certificate must have. Default: the host in --server.",
    ),
    click.option(
        "--token-file",
        type=_FILE,
        metavar="FILE",
        help="File whose first token is sent as the bearer token.",
    ),
    click.option(
        "--allow-plaintext-token",
        is_flag=True,
        help="Send the token to another machine without TLS, although it can be read in transit.",
    ),
)
