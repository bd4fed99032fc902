"""Options of the verbs that ask a server: where it is, how to know it, and what to show it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from layertap.client import Client

__all__ = ["ServerAddress", "connection_options"]

F = TypeVar("F", bound=Callable[..., Any])

_FILE = click.Path()


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """What the command line says about a server.

    Attributes:
        target: Its address.
        tls: Whether to use TLS; any of the next four means yes as well.
        ca: PEM file of the server's authority.
        cert: PEM file of the client's certificate.
        key: PEM file of its key.
        server_name: The name to expect in the server's certificate.
        token_file: A file whose first token is sent.
        allow_plaintext_token: Whether it may be sent to another machine without TLS.
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
        """Return a client, which is the caller's to close.

        Args:
            timeout: Seconds that a call may take.

        Raises:
            ConfigError: For files that won't do, and for a token that must not be sent.
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


def connection_options(default: str | None = None) -> Callable[[F], F]:
    """Return what adds ``--server`` and what belongs to it to a verb.

    Args:
        default: The server to ask where none is named; None for verbs that can do without one.

    Returns:
        A decorator; the verb gets ``server``, a ServerAddress, or None without a default.
    """

    def decorate(function: F) -> F:
        verb: Any = _with_connection(function)
        for option in reversed((_server_option(default), *_OPTIONS)):
            verb = option(verb)
        return verb  # type: ignore[no-any-return] # the same function, to click

    return decorate


def _with_connection(function: Callable[..., Any]) -> Callable[..., Any]:
    names = ("tls", "ca", "cert", "key", "server_name", "token_file", "allow_plaintext_token")

    @functools.wraps(function)
    def verb(*args: Any, server: str | None, **flags: Any) -> Any:
        given = {name: flags.pop(name) for name in names}
        if server is None:
            extra = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
            if extra:
                raise click.UsageError(f"{', '.join(extra)}: only together with --server")
            return function(*args, server=None, **flags)
        return function(*args, server=ServerAddress(server, **given), **flags)

    return verb


def _server_option(default: str | None) -> Callable[[F], F]:
    text = f"Default {default}." if default else "Ask this server instead of loading MODEL here."
    return click.option("--server", metavar="HOST:PORT", default=default, help=text)


_OPTIONS = (
    click.option("--tls", is_flag=True, help="It has TLS, and a public authority vouches for it."),
    click.option("--ca", type=_FILE, metavar="PEM", help="It has TLS, and this vouches for it."),
    click.option("--cert", type=_FILE, metavar="PEM", help="The certificate to show to it."),
    click.option("--key", type=_FILE, metavar="PEM", help="The key of --cert."),
    click.option(
        "--server-name",
        metavar="NAME",
        help="The name to expect in its certificate; default: the host.",
    ),
    click.option(
        "--token-file", type=_FILE, metavar="FILE", help="Whose first line is the token to send."
    ),
    click.option(
        "--allow-plaintext-token",
        is_flag=True,
        help="Send the token to another machine without TLS, for all to read on the way.",
    ),
)
