"""``layertap health``."""

from __future__ import annotations

import urllib.error
import urllib.request
from urllib.parse import urlsplit

import click

from layertap.cli.connection import ServerAddress, connection_options
from layertap.client.base import TARGET

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
    "--url",
    metavar="URL",
    help="Ask the server's HTTP port instead, as http://127.0.0.1:8002/readyz; it needs no "
    "certificates where the server has TLS.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    metavar="S",
    help="Seconds to wait for the answer; default 5.",
)
def health(server: ServerAddress, service: str, url: str | None, timeout: float) -> None:
    """Ask a server for its health, by grpc.health.v1. It needs no token for that.

    Exit code 0 if it is SERVING, else 1: a probe for containers and scripts. With --url it asks by
    HTTP, and the exit code is 0 if the answer's status is 200.

    \b
    Examples:
      layertap health
      layertap health --server 127.0.0.1:9001 --service resnet18 --timeout 1
      layertap health --server gpu1:8001 --ca server.pem
      layertap health --url http://127.0.0.1:8002/readyz
    """
    if url is not None:
        _ask_by_http(url, timeout)
        return
    with server.client(timeout) as client:
        status = client.health(service)
    print(status)
    if status != "SERVING":
        raise SystemExit(1)


def _ask_by_http(url: str, timeout: float) -> None:
    """Print what a page of the HTTP port answers; exit with 1 unless its status is 200."""
    if urlsplit(url).scheme != "http" or not urlsplit(url).hostname:
        raise click.BadParameter(f"got {url!r}, expected http://HOST:PORT/readyz", param_hint="url")
    # Never by a proxy of the environment, which could not reach this machine's own addresses.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout) as reply:
            print(reply.read(200).decode("utf-8", "replace").strip())
    except urllib.error.HTTPError as error:
        with error:
            print(error.read(200).decode("utf-8", "replace").strip())
        raise SystemExit(1) from None
    except OSError as error:
        raise click.ClickException(f"{url}: no answer: {error}") from None
