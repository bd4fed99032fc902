"""``layertap health``."""

from __future__ import annotations

import urllib.error
import urllib.request
from urllib.parse import urlsplit

import click

from layertap.addresses import TARGET
from layertap.cli.connection import ServerAddress, connection_options

__all__ = ["health"]


@click.command(short_help="Check whether a server is ready.")
@connection_options(TARGET)
@click.option(
    "--service",
    default="",
    metavar="NAME",
    help="A model's name, or a service such as layertap.v1.FeatureService. Default: the server.",
)
@click.option(
    "--url",
    metavar="URL",
    help="Call the server's HTTP port instead, such as http://127.0.0.1:8002/readyz. It needs no "
    "certificates, even if the server uses TLS.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    metavar="S",
    help="Seconds to wait for the answer. Default: 5.",
)
def health(server: ServerAddress, service: str, url: str | None, timeout: float) -> None:
    """Check a server's health with grpc.health.v1, which needs no token.

    The exit code is 0 if the server is SERVING and 1 otherwise, so this is a probe for containers
    and scripts. With --url it calls HTTP, and the exit code is 0 if the answer's status is 200.

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
    """Print the answer of a page of the HTTP port; exit with 1 unless its status is 200."""
    if urlsplit(url).scheme != "http" or not urlsplit(url).hostname:
        raise click.BadParameter(f"got {url!r}, expected http://HOST:PORT/readyz", param_hint="url")
    # Ignore the proxies of the environment: they can't reach this machine's own addresses.
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
