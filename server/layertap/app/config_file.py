"""Reads ``layertap.toml``. Errors name the file, the line and the key."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar

from layertap.app.budget import defaults_here
from layertap.app.config import ServerConfig
from layertap.errors import ConfigError, LayertapError
from layertap.settings import (
    Definition,
    Limits,
    ModelSpec,
    ServedModel,
    ServerOptions,
    SourceKind,
    build,
    definitions,
    replaced,
)
from layertap.settings.paths import expanded, is_path

__all__ = ["config_of", "load_config"]

T = TypeVar("T")
KeyPath = tuple[str | int, ...]

_SECTIONS = ("server", "limits", "models")


def load_config(path: str | Path) -> ServerConfig:
    """Read a configuration file. Relative paths in it are relative to its folder.

    Raises:
        ConfigError: If the file can't be read or is invalid.
    """
    file = Path(path)
    try:
        text = file.read_text("utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text, as TOML is: {error.reason}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: {error}") from error
    return _Reader(file, text).config(document)


def config_of(document: Mapping[str, Any], name: str) -> ServerConfig:
    """Return the configuration in a document with the keys of ``layertap.toml``.

    Relative paths in it are relative to the working directory.

    Args:
        document: ``server``, ``limits`` and ``models``, each as TOML would give it.
        name: What errors call the document.

    Raises:
        ConfigError: If it is invalid.
    """
    return _Reader(Path(name), "").config(document)


class _Reader:
    """Converts a parsed document to a ServerConfig; finds the lines of keys for its errors."""

    def __init__(self, file: Path, text: str) -> None:
        self._file = file
        self._text = text

    def config(self, document: Mapping[str, Any]) -> ServerConfig:
        """Check every key and value of the document, and return the configuration."""
        self._check_keys(document, _SECTIONS, ())
        tables = document.get("models", [])
        if not isinstance(tables, list):
            raise self._wrong(("models",), tables, "a list of tables, each headed [[models]]")
        return ServerConfig(
            server=self._section(ServerOptions, document.get("server", {}), ("server",)),
            limits=self._section(Limits, document.get("limits", {}), ("limits",)),
            models=tuple(self._model(table, index) for index, table in enumerate(tables)),
        )

    def _section(self, owner: type[T], table: object, path: KeyPath) -> T:
        return build(owner, {**defaults_here(owner), **self._values(owner, table, path)})

    def _values(self, owner: type, table: object, path: KeyPath) -> dict[str, Any]:
        """Check a table; return the raw values by key."""
        if not isinstance(table, Mapping):
            raise self._wrong(path, table, f"a table headed [{path[0]}]")
        known = {each.key: each for each in definitions(owner)}
        self._check_keys(table, tuple(known), path)
        for key, each in known.items():
            if each.required and key not in table:
                raise self._error(path, f"{_dotted(path)} has no {key}")
        return {key: self._value(known[key], table[key], (*path, key)) for key in table}

    def _value(self, setting: Definition, given: object, path: KeyPath) -> Any:
        kind = setting.kind
        try:
            value = kind.check(given)
        except ValueError as error:
            raise self._error(path, f"{_dotted(path)}: {error}") from None
        if kind.is_path and value not in kind.words:
            # `~` means the user's home, not a folder next to the file.
            return str(self._file.parent / expanded(value))
        return value

    def _model(self, table: object, index: int) -> ServedModel:
        path: KeyPath = ("models", index)
        values = self._values(ServedModel, table, path)
        try:
            model = build(ServedModel, values)
        except LayertapError as error:
            raise self._error(path, str(error)) from None
        spec, folder = model.spec, self._file.parent
        weights = str(folder / expanded(spec.weights)) if is_path(spec.weights) else spec.weights
        return replaced(model, {"source": _from_folder(folder, spec), "weights": weights})

    def _check_keys(self, table: Mapping[str, object], known: Sequence[str], path: KeyPath) -> None:
        for key in table:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"did you mean {close[0]!r}?" if close else f"keys are {', '.join(known)}"
                raise self._error((*path, key), f"{_dotted((*path, key))}: unknown key; {hint}")

    def _wrong(self, path: KeyPath, value: object, expected: str) -> ConfigError:
        return self._error(path, f"{_dotted(path)}: got {value!r}, expected {expected}")

    def _error(self, path: KeyPath, text: str) -> ConfigError:
        line = _line_of(self._text, path)
        return ConfigError(f"{self._file}{f', line {line}' if line else ''}: {text}")


def _from_folder(folder: Path, spec: ModelSpec) -> str:
    """Return the source, its path taken as relative to the file's folder.

    What a Hugging Face source names is a path only if there is such a file or folder, or if it
    begins like one.
    """
    path = folder / expanded(spec.target)
    if spec.kind.is_hugging_face:
        relative = path.exists() or spec.target.startswith((".", "~", "/"))
    else:
        relative = spec.kind is SourceKind.TORCHSCRIPT
    if not relative or PurePath(spec.target).is_absolute():
        return spec.source
    return f"{spec.kind}:{path}"


def _dotted(path: KeyPath) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _line_of(text: str, path: KeyPath) -> int | None:
    """Return the line, counted from 1, on which a key is given its value.

    tomllib reports no positions, and a text search would find the key in comments, other tables and
    long texts too. So the file is parsed again, each time one line longer: the key is on the line
    after the longest valid beginning without the key. This takes time only if there is an error.
    """
    lines = text.split("\n")
    begin = 0
    for end in range(len(lines) + 1):
        try:
            document = tomllib.loads("\n".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue  # The line is inside a value that spans several lines.
        if _has(document, path):
            return begin + 1
        begin = end
    return None


def _has(value: Any, path: KeyPath) -> bool:
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True
