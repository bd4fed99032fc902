"""``layertap``: its commands, and how they report errors."""

from __future__ import annotations

from typing import Any

import click

from layertap import __version__
from layertap.cli.explain import explain
from layertap.cli.extract import extract
from layertap.cli.health import health
from layertap.cli.layers import layers
from layertap.cli.reload import reload
from layertap.cli.serve import serve
from layertap.errors import LayertapError

__all__ = ["main"]


_SERVER_PARTS = (
    "PIL",
    "blake3",
    "prometheus_client",
    "safetensors",
    "simplejpeg",
    "torch",
    "torchvision",
)
"""Modules of the extra ``server``; without that extra, the package is only a client."""


class _Verbs(click.Group):
    """Shows layertap's own errors as a message with exit code 1, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except LayertapError as error:
            raise click.ClickException(str(error)) from error
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in _SERVER_PARTS:
                raise
            raise click.ClickException(
                f"this command runs models in its own process, which needs {error.name}; install "
                f"it with: pip install 'layertap[server]'"
            ) from error


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """Extract layers of PyTorch models, over gRPC or straight into a file.

    \b
    Examples:
      layertap layers resnet18                                list the layers
      layertap serve resnet18 --layers layer1,avgpool         serve them on port 8001
      layertap extract resnet18 cat.jpg -l avgpool -o cat.npz
      layertap explain resnet18 cat.jpg -l layer4 -o cat.png

    Each command has its own --help. Exit codes: 0 success, 1 failure (the message says why), 2 a
    wrong command line.
    """


main.add_command(serve)
main.add_command(reload)
main.add_command(layers)
main.add_command(extract)
main.add_command(explain)
main.add_command(health)
