"""The options of ``layertap serve`` that name certificates and tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

__all__ = ["secret_options"]

F = TypeVar("F", bound=Callable[..., Any])

# In the order of --help. Files only: a command line can be read by every user of the machine.
_OPTIONS = (
    ("--tls-cert", "PEM", "The server's certificate and those up to its authority; turns TLS on."),
    ("--tls-key", "PEM", "Its private key."),
    ("--tls-client-ca", "PEM", "Clients must show a certificate that one of these vouches for."),
    ("--extract-tokens-file", "FILE", "Bearer tokens that may extract, one a line; default: all."),
    ("--admin-tokens-file", "FILE", "Bearer tokens that may administrate, too; default: none."),
)


def secret_options(function: F) -> F:
    """Add them; each has the name of its key in ``[server]``."""
    for flag, metavar, text in reversed(_OPTIONS):
        function = click.option(flag, type=click.Path(), metavar=metavar, help=text)(function)
    return function
