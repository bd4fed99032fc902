"""``layertap reload``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from layertap.addresses import TARGET
from layertap.cli.connection import ServerAddress, connection_options
from layertap.errors import PermissionDeniedError, UnavailableError

if TYPE_CHECKING:
    from layertap.v1 import admin_service_pb2

__all__ = ["reload"]


@click.command(short_help="Make a server reload its configuration and weights.")
@connection_options(TARGET)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    metavar="S",
    help="Seconds to wait until the new versions are warm. Default: 600.",
)
def reload(server: ServerAddress, timeout: float) -> None:
    """Make a server reload its configuration and changed weights, without failing a request.

    It reloads its certificates and tokens as well. The server must run with --admin; `kill -HUP`
    does the same without it. If a model can't be loaded, the reason is printed, the server keeps
    its previous version, and the exit code is 1.

    \b
    Examples:
      layertap reload
      layertap reload --server gpu1:8001 --ca server.pem --token-file admin.tokens
    """
    with server.client(timeout) as client:
        try:
            report = client.reload()
        except (PermissionDeniedError, UnavailableError) as error:
            raise type(error)(
                f"{server.target}: {error} (a server accepts reloads only if it runs with --admin)"
            ) from error
    for model in report.models:
        click.echo(_line(model))
    for text in report.not_applied:
        click.echo(f"needs a restart: {text}")
    from layertap.v1 import admin_service_pb2

    failed = admin_service_pb2.RELOAD_ACTION_FAILED
    raise SystemExit(any(model.action == failed for model in report.models))


def _line(model: admin_service_pb2.ModelReload) -> str:
    from layertap.v1 import admin_service_pb2

    action = admin_service_pb2.ReloadAction.Name(model.action).removeprefix("RELOAD_ACTION_")
    line = f"{model.name}: {action.lower()}"
    if model.reason:
        kept = "still serving the previous version" if model.serving else "not served"
        line += f", {kept}: {model.reason}"
    return line
