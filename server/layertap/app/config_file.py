"""Reading ``layertap.toml``, with errors that name the file, the line and the key."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar, get_type_hints

import msgspec
from msgspec import Struct

from layertap.app.config import (
    SECRET_FILES,
    LimitsSection,
    ModelSection,
    ServerConfig,
    ServerSection,
)
from layertap.errors import ConfigError, LayertapError
from layertap.models import ModelSpec, SourceKind
from layertap.models.checkpoint_files import expanded, is_path

__all__ = ["load_config"]

S = TypeVar("S", bound=Struct)
KeyPath = tuple[str | int, ...]

_SECTIONS = ServerConfig.__struct_fields__


def load_config(path: str | Path) -> ServerConfig:
    """Read a configuration file. Relative paths in it are relative to its folder.

    Raises:
        ConfigError: Where the file can't be read or says something wrong.
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


class _Reader:
    """Turns a parsed document into a ServerConfig, and knows where in the text a key stands."""

    def __init__(self, file: Path, text: str) -> None:
        self._file = file
        self._text = text

    def config(self, document: Mapping[str, Any]) -> ServerConfig:
        """Check every key and value of the document."""
        self._check_keys(document, _SECTIONS, ())
        tables = document.get("models", [])
        if not isinstance(tables, list):
            raise self._wrong(("models",), tables, "a list of tables, each headed [[models]]")
        return ServerConfig(
            server=self._server(document.get("server", {})),
            limits=self._section(LimitsSection, document.get("limits", {}), ("limits",)),
            models=tuple(self._model(table, index) for index, table in enumerate(tables)),
        )

    def _server(self, table: object) -> ServerSection:
        server = self._section(ServerSection, table, ("server",))
        # A `~` is the user's home, not a folder beside the file.
        files = {
            key: Path(name).expanduser()
            for key in (*SECRET_FILES, "unix_socket")
            if (name := getattr(server, key))
        }
        if server.plan_cache not in ("auto", "off"):
            files["plan_cache"] = Path(server.plan_cache).expanduser()
        folder = self._file.parent
        return msgspec.structs.replace(server, **{k: str(folder / f) for k, f in files.items()})

    def _section(self, kind: type[S], table: object, path: KeyPath) -> S:
        if not isinstance(table, Mapping):
            raise self._wrong(path, table, f"a table headed [{path[0]}]")
        self._check_keys(table, kind.__struct_fields__, path)
        missing = [f.name for f in msgspec.structs.fields(kind) if f.required]
        for name in missing:
            if name not in table:
                raise self._error(path, f"{_dotted(path)} has no {name}")
        types = get_type_hints(kind, include_extras=True)
        values = {name: self._value(types[name], table[name], (*path, name)) for name in table}
        return kind(**values)

    def _value(self, type_: Any, value: object, path: KeyPath) -> Any:
        try:
            return msgspec.convert(value, type_)
        except msgspec.ValidationError:
            expected = type_.__metadata__[0].description
            raise self._wrong(path, value, expected) from None

    def _model(self, table: object, index: int) -> ModelSection:
        path: KeyPath = ("models", index)
        model = self._section(ModelSection, table, path)
        try:
            spec = model.spec()
            model.selections()
        except LayertapError as error:
            raise self._error(path, str(error)) from None
        return msgspec.structs.replace(
            model,
            source=_from_folder(self._file.parent, spec),
            weights=str(self._file.parent / expanded(spec.weights))
            if is_path(spec.weights)
            else spec.weights,
            name=spec.name,
        )

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
    """Return the source, its path taken as relative to the file's folder."""
    if spec.kind is not SourceKind.TORCHSCRIPT or PurePath(spec.target).is_absolute():
        return spec.source
    return f"{SourceKind.TORCHSCRIPT}:{folder / expanded(spec.target)}"


def _dotted(path: KeyPath) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _line_of(text: str, path: KeyPath) -> int | None:
    """Return the line, from 1, where a key is given its value.

    tomllib tells no positions, and a search for the key's letters would find it in comments, other
    tables and long texts. So the file is parsed again, a line longer each time: the key stands on
    the line after the longest valid beginning that lacks it. Only an error takes that time.
    """
    lines = text.split("\n")
    begin = 0
    for end in range(len(lines) + 1):
        try:
            document = tomllib.loads("\n".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue  # The line is within a value that spans lines.
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
