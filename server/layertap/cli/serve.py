"""``layertap serve``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layertap.cli.flags import setting_flags
from layertap.cli.importing import without_collecting
from layertap.cli.options import find_local_modules
from layertap.errors import LayertapError
from layertap.settings import ServedModel, ServerOptions, definitions

if TYPE_CHECKING:
    from layertap.app.config import ServerConfig
    from layertap.cli.render import Stderr

__all__ = ["read_config", "serve"]

_MODEL_FLAGS = tuple(each.key for each in definitions(ServedModel) if each.flag)
_SERVER_FLAGS = tuple(each.key for each in definitions(ServerOptions) if each.flag)


@click.command(short_help="Serve models over gRPC.")
@click.argument("models", nargs=-1, metavar="[[NAME=]MODEL]...")
@setting_flags(definitions(ServedModel))
@setting_flags(definitions(ServerOptions))
@click.option(
    "--config",
    "config_file",
    type=click.Path(),
    metavar="FILE",
    help="A layertap.toml with [server], [limits] and [[models]]; flags win over it.",
)
def serve(models: tuple[str, ...], config_file: str | None, **flags: Any) -> None:
    """Serve models over gRPC until SIGTERM or Ctrl-C.

    MODEL is a torchvision model (resnet18), a timm model (timm:convnext_tiny), a Hugging Face model
    (hf:FOLDER), a TorchScript file (net.pt) or a factory (package.module:function). Flags apply to
    every MODEL; a file given with --config can configure each one differently.

    \b
    Examples:
      layertap serve resnet18
      layertap serve resnet18 --weights random --layers layer1,avgpool:input
      layertap serve a=nets/a.pt b=mynets:build --device cuda --port 9001
      layertap serve --config layertap.toml --port 0

    Health (grpc.health.v1) is NOT_SERVING until the models are loaded and their layers are warm;
    each model has its own status. SIGHUP reloads the configuration and changed weights without
    failing a request. A second SIGTERM ends the process at once.
    """
    if not models and config_file is None:
        raise click.UsageError("nothing to serve: name a MODEL, or a file with --config")
    # All errors in a command line or a file are reported before PyTorch is imported, which takes
    # seconds. A test checks what this command imports before that.
    from layertap.app.logs import (
        LogNarrator,
        configure_logs,
        log_everything_as_json,
        set_log_level,
    )
    from layertap.app.security import open_security

    as_json = flags["log_format"] == "json"
    if as_json:  # Before importing torch, which may print something.
        log_everything_as_json(flags["log_level"] or "warning")
    find_local_modules()
    read = partial(read_config, models, config_file, flags)
    try:
        config = read()
    except LayertapError as error:
        if not as_json:
            raise
        LogNarrator().say(str(error), logging.ERROR)
        raise SystemExit(1) from None
    level = config.server.log_level
    if config.server.log_format != "json":
        configure_logs("human", level)
    elif as_json:
        set_log_level(level)
    else:
        log_everything_as_json(level)
    narrator = LogNarrator() if config.server.log_format == "json" else _stderr()
    try:
        config.check()
        open_security(config.server.secrets)  # The server reads the files again when it starts.
    except LayertapError as error:
        narrator.say(str(error), logging.ERROR)
        raise SystemExit(1) from None

    with without_collecting():
        from layertap.app import lifecycle

    path = Path(config_file) if config_file else None
    raise SystemExit(lifecycle.run_server(config, narrator, read, path))


def read_config(
    models: Sequence[str], config_file: str | None, flags: Mapping[str, Any]
) -> ServerConfig:
    """Return the configuration for the arguments of ``layertap serve``.

    Args:
        models: The MODEL arguments.
        config_file: The path of a layertap.toml to read; None for none.
        flags: The values of all other options, by name.

    Raises:
        LayertapError: If the file can't be read, or a value in it or in ``models`` is invalid.
    """
    from layertap.app.config import default_config, with_flags
    from layertap.app.config_file import load_config

    return with_flags(
        load_config(config_file) if config_file else default_config(),
        models,
        {key: flags[key] for key in _MODEL_FLAGS},
        {key: flags[key] for key in _SERVER_FLAGS},
    )


def _stderr() -> Stderr:
    from layertap.cli.render import Stderr

    return Stderr()
