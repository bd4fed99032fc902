"""Options and helpers of the verbs that run a model, in this process or on a server."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from layertap.cli.connection import connection_options
from layertap.cli.flags import setting_flags
from layertap.settings import ModelSpec, ServerOptions, definitions, replaced

if TYPE_CHECKING:
    from layertap.cli.connection import ServerAddress
    from layertap.engine import Engine

__all__ = [
    "embedded_engine",
    "find_local_modules",
    "local_model_options",
    "refuse_with_server",
]

F = TypeVar("F", bound=Callable[..., Any])

_DEVICE = next(each for each in definitions(ServerOptions) if each.key == "device")


def local_model_options(function: F) -> F:
    """Add the flags of a model that is loaded into this process, and ``--server`` instead."""
    with_server = connection_options()(function)
    return setting_flags((*definitions(ModelSpec), _DEVICE))(with_server)


def refuse_with_server(server: ServerAddress | None, flags: Mapping[str, object]) -> None:
    """Raise UsageError for flags that say how to load a model, together with ``--server``."""
    given = ", ".join(f"--{name.replace('_', '-')}" for name, v in flags.items() if v is not None)
    if server and given:
        raise click.UsageError(
            f"{given}: not together with --server, whose model is loaded already"
        )


def embedded_engine(model: str, flags: Mapping[str, Any]) -> tuple[Engine, str]:
    """Load a model into this process.

    Args:
        model: ``[NAME=]SOURCE``.
        flags: The values of ``local_model_options``, by key; None for those that were not given.

    Returns:
        The engine, which the caller closes, and the model's name in it.

    Raises:
        ConfigError, ModelLoadError: As ``Engine.load`` does.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    device = given.pop("device", _DEVICE.default)
    spec = replaced(ModelSpec.parse(model), given)
    from layertap.engine import Engine, allow_tf32, choose_device

    find_local_modules()
    allow_tf32(False)
    engine = Engine(device=choose_device(device))
    try:
        engine.load(spec)
    except BaseException:
        engine.close()
        raise
    return engine, spec.name


def find_local_modules() -> None:
    """Let factories ``module:function`` be found in the current folder, as ``python -m`` would.

    Last, so that no file there takes the place of an installed module.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
