"""Command-line flags for settings, made from the declarations in ``layertap.settings``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from layertap.settings import Definition
from layertap.settings.value_kinds import TRUTH, ValueKind

__all__ = ["setting_flags"]

F = TypeVar("F", bound=Callable[..., Any])


def setting_flags(settings: Iterable[Definition]) -> Callable[[F], F]:
    """Return a decorator that gives a command one flag for each setting that has a flag.

    The command gets the raw value by the setting's key; None if the flag was not given.
    """
    options = [_option(each) for each in settings if each.flag]

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _option(setting: Definition) -> Callable[[F], F]:
    if setting.kind is TRUTH:
        off = f"--no-{setting.flag.removeprefix('--')}"
        on = " On by default." if setting.default_text == "true" else ""
        return click.option(
            f"{setting.flag}/{off}", setting.key, default=None, help=f"{setting.setting.help}{on}"
        )
    default = f" Default: {setting.default_text}." if setting.default_text else ""
    return click.option(
        setting.flag,
        setting.key,
        type=_type(setting.kind),
        metavar=None if setting.kind.choices else setting.kind.metavar,
        help=f"{setting.setting.help}{default}",
    )


def _type(kind: ValueKind) -> click.ParamType[Any]:
    return click.Choice(kind.choices) if kind.choices else _Value(kind)


class _Value(click.ParamType[Any]):
    """A value of one kind, checked by the same rules as in a configuration file."""

    def __init__(self, kind: ValueKind) -> None:
        self.name = kind.metavar.lower()
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the raw value of a text; refuse an invalid text."""
        if not isinstance(value, str):
            return value
        try:
            return self._kind.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
