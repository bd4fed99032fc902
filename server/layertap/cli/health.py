"""``layertap health``."""

from __future__ import annotations

import click

from layertap.cli.connection import Connection, connection_options
from layertap.client.client import TARGET

__all__ = ["health"]


@click.command(short_help="Ask a server whether it is ready.")
@connection_options(TARGET)
@click.option(
    "--service",
    default="",
    metavar="NAME",
    help="Ask for one model by its name, or for layertap.v1.FeatureService; default: the server.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    metavar="S",
    help="Seconds to wait for the answer; default 5.",
)
def health(server: Connection, service: str, timeout: float) -> None:
    """Ask a server for its health, by grpc.health.v1. It needs no token for that.

    Exit code 0 if it is SERVING, else 1: a probe for containers and scripts.

    \b
    Examples:
      layertap health
      layertap health --server 127.0.0.1:9001 --service resnet18 --timeout 1
      layertap health --server gpu1:8001 --ca server.pem
    """
    with server.client(timeout) as client:
        status = client.health(service)
    print(status)
    if status != "SERVING":
        raise SystemExit(1)
