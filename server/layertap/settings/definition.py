"""Declarations of settings, and the checks and texts derived from them.

A setting is a field of a frozen dataclass. Its annotation has everything else about it:

    port: Annotated[int, Setting("The port to listen on.", kinds.PORT)] = 8001

The key in the configuration file (``layertap.app.config_file``), the command-line flag
(``layertap.cli.flags``) and the row in docs/settings.md (``tools/gen_settings.py``) are made from
it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from layertap.settings.value_kinds import ValueKind

__all__ = ["NO_FLAG", "Definition", "Setting", "build", "definitions", "replaced"]

T = TypeVar("T")

NO_FLAG = "-"
"""The flag of a setting that only a configuration file sets."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The annotation of a setting. Its name, type and default are the field's own.

    Attributes:
        help: What it is for, in one sentence.
        kind: The kind of its values.
        key: Its key in the configuration file; the field's name if empty.
        flag: Its flag; if empty, the key with hyphens; ``NO_FLAG`` for none.
        default: The default in words, if the field's own default needs explaining.
        memory_share: If above 0, the default in the configuration is at most this fraction of the
            memory that the process may use: 8 for an eighth.
        live: Whether a reload applies it; otherwise it takes effect at the next start.
    """

    help: str
    kind: ValueKind
    key: str = ""
    flag: str = ""
    default: str = ""
    memory_share: int = 0
    live: bool = False


@dataclass(frozen=True, slots=True)
class Definition:
    """A setting of a dataclass, with everything filled in.

    Attributes:
        path: The names of the fields that lead to it, through nested dataclasses.
        key: Its key in the configuration file.
        flag: Its flag, such as ``--port``; empty for none.
        setting: Its annotation.
        default: The value if it is not given; MISSING if it must be given.
    """

    path: tuple[str, ...]
    key: str
    flag: str
    setting: Setting
    default: Any

    @property
    def kind(self) -> ValueKind:
        """The kind of its values."""
        return self.setting.kind

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is MISSING

    @property
    def default_text(self) -> str:
        """The default as documentation shows it; empty if there is nothing to show."""
        if self.setting.default:
            return self.setting.default
        if self.required or self.default is None or self.default in ("", ()):
            return ""
        raw = self.kind.to_raw(self.default)
        if isinstance(raw, bool):
            return "true" if raw else "false"
        text = f"{raw:g}" if isinstance(raw, float) else str(raw)
        return f"{text}, or less where memory is short" if self.setting.memory_share else text

    def value_in(self, owner: object) -> Any:
        """Return an object's raw value for this setting; None if it has none."""
        value = functools.reduce(getattr, self.path, owner)
        return None if value is None else self.kind.to_raw(value)


def definitions(owner: type) -> tuple[Definition, ...]:
    """Return the settings of a dataclass in order, including those of nested dataclasses."""
    if owner not in _known:
        _known[owner] = tuple(_definitions(owner))
    return _known[owner]


_known: dict[type, tuple[Definition, ...]] = {}


def _definitions(owner: type) -> Iterator[Definition]:
    hints = get_type_hints(owner, include_extras=True)
    for each in fields(owner):
        hint = hints[each.name]
        setting = next((m for m in getattr(hint, "__metadata__", ()) if type(m) is Setting), None)
        if setting is not None:
            yield _definition(each.name, each.default, setting)
        elif isinstance(hint, type) and is_dataclass(hint):
            for inner in definitions(hint):
                yield replace(inner, path=(each.name, *inner.path))


def _definition(name: str, default: Any, setting: Setting) -> Definition:
    key = setting.key or name
    flag = setting.flag or f"--{key.replace('_', '-')}"
    return Definition((name,), key, "" if flag == NO_FLAG else flag, setting, default)


def build(owner: type[T], values: Mapping[str, Any]) -> T:
    """Return an object with these settings, and defaults for the others.

    Args:
        owner: The dataclass.
        values: Raw values by key.

    Raises:
        LayertapError: If the dataclass refuses a value.
    """
    given = _by_path(owner, values)
    hints = get_type_hints(owner)
    return owner(
        **given.own, **{name: build(hints[name], inner) for name, inner in given.nested.items()}
    )


def replaced(instance: T, values: Mapping[str, Any]) -> T:
    """Return a copy of an object with other values for these settings.

    Args:
        instance: The object, whose dataclass has settings.
        values: Raw values by key.

    Raises:
        LayertapError: If the dataclass refuses a value.
    """
    given = _by_path(type(instance), values)
    changes = {
        name: replaced(getattr(instance, name), inner) for name, inner in given.nested.items()
    }
    # mypy doesn't know that an object with settings is a dataclass.
    return replace(instance, **given.own, **changes)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class _Given:
    """Values for one dataclass: its own fields, and raw values by key for nested dataclasses."""

    own: dict[str, Any] = field(default_factory=dict)
    nested: dict[str, dict[str, Any]] = field(default_factory=dict)


def _by_path(owner: type, values: Mapping[str, Any]) -> _Given:
    given = _Given()
    for each in definitions(owner):
        if each.key not in values:
            continue
        if len(each.path) == 1:
            given.own[each.path[0]] = each.kind.from_raw(values[each.key])
        else:
            given.nested.setdefault(each.path[0], {})[each.key] = values[each.key]
    return given
