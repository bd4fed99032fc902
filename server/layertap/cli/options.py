"""Options and helpers of commands that run a model, in this process or on a server."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from layertap.cli.connection import connection_options
from layertap.cli.flags import setting_flags
from layertap.cli.importing import without_collecting
from layertap.settings import ModelSpec, ServerOptions, definitions

if TYPE_CHECKING:
    from layertap.local import LocalModel

__all__ = [
    "find_local_modules",
    "local_model",
    "local_model_options",
    "refuse_with_server",
]

F = TypeVar("F", bound=Callable[..., Any])

_DEVICE, _PLAN_CACHE = (
    next(each for each in definitions(ServerOptions) if each.key == key)
    for key in ("device", "plan_cache")
)


def local_model_options(*, several: bool = False) -> Callable[[F], F]:
    """Return a decorator that adds the flags for loading a model, and ``--server`` instead.

    Args:
        several: Whether there may be several servers; see ``connection_options``.
    """

    def decorate(function: F) -> F:
        with_server = connection_options(several=several)(function)
        return setting_flags((*definitions(ModelSpec), _DEVICE, _PLAN_CACHE))(with_server)

    return decorate


def refuse_with_server(server: object, flags: Mapping[str, object]) -> None:
    """Raise UsageError if flags for loading a model are given together with ``--server``."""
    given = ", ".join(f"--{name.replace('_', '-')}" for name, v in flags.items() if v is not None)
    if server and given:
        raise click.UsageError(
            f"{given}: not together with --server, whose model is loaded already"
        )


def local_model(model: str, flags: Mapping[str, Any]) -> LocalModel:
    """Load a model into this process.

    Args:
        model: ``[NAME=]SOURCE``.
        flags: The values of ``local_model_options``, by key; None for those that were not given.

    Returns:
        The model; the caller must close it.

    Raises:
        ConfigError, ModelLoadError: See ``layertap.load``.
    """
    with without_collecting():
        from layertap.local import load

    find_local_modules()
    given = {key: value for key, value in flags.items() if value is not None}
    return load(model, **{"device": _DEVICE.default, **given})


def find_local_modules() -> None:
    """Let factories ``module:function`` be found in the current folder, like ``python -m``.

    The folder is searched last, so that no file in it replaces an installed module.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
