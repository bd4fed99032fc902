"""Rows of Parquet files: a column with images, paths of images, texts or arrays."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layertap.dataset.addresses import is_address
from layertap.dataset.sources.content import ArrayContent, Content, ImageContent, TextContent
from layertap.dataset.sources.source import (
    Source,
    file_bytes,
    file_stamp,
    open_file,
    printable,
)
from layertap.errors import ConfigError, InvalidInputError
from layertap.texts import Truncation

if TYPE_CHECKING:
    from layertap.inputs import InputLike

__all__ = ["ParquetRows"]

_IDS = ("ids", "id", "__key__", "key")
_PATHS = frozenset({"path", "file", "file_name", "filename", "filepath", "image_path"})
_TEXTS = frozenset({"text", "caption", "sentence", "prompt"})
_GROUPS_KEPT = 2


class ParquetRows(Source):
    """The rows of a Parquet file. Row groups are read whole, and two of them are kept.

    The id is the value of the column ``ids``, ``id``, ``__key__`` or ``key``, or else such as
    ``rows.parquet:0``. The content is a column of bytes (images), of structs with bytes or a path
    as Hugging Face datasets have them, of lists of numbers (arrays), or of strings: paths of images
    if it is called ``path``, ``file_name`` or the like, texts if it is called ``text``, ``caption``
    or the like. Paths are relative to the folder of the Parquet file.

    Args:
        path: The path of the file.
        field: The column; if empty, the only one that is of one of these kinds. ``:path`` or
            ``:text`` after the name says what its strings are.
        truncation: Where a text with too many tokens is cut.

    Raises:
        ConfigError: If pyarrow is not installed.
        InvalidInputError: If the file can't be read, or it is not clear which column to take.
    """

    def __init__(
        self, path: str, field: str = "", truncation: Truncation = Truncation.NONE
    ) -> None:
        self._path = path
        self._name = printable(path)
        self._stamp = file_stamp(path)
        self._file = _opened(path)
        schema = self._file.schema_arrow
        self._ids = _ids(self._file)
        name, _, kind = (
            field.rpartition(":") if field.endswith((":path", ":text")) else (field, "", "")
        )
        self._column, self._paths = _column(path, schema, name, kind)
        self._content = _content(schema.field(self._column).type, self._paths, truncation)
        self.noun = self._content.noun
        groups = range(self._file.num_row_groups)
        self._ends = list(accumulate(self._file.metadata.row_group(g).num_rows for g in groups))
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._ends[-1] if self._ends else 0

    def id(self, index: int) -> str:
        """See Source."""
        return self._ids[index] if self._ids is not None else f"{self._name}:{index}"

    def stamp(self, index: int) -> str:
        """See Source."""
        return f"{self._stamp} {index}"

    def read(self, index: int) -> Any:
        """See Source."""
        group = bisect_right(self._ends, index)
        begin = self._ends[group - 1] if group else 0
        value = self._group(group)[index - begin]
        kind = value.type
        content = value.as_py()
        if isinstance(content, dict):
            content = content.get("bytes") or content.get("path")
        if content is None:
            raise InvalidInputError(f"the column {self._column!r} has no value")
        if isinstance(content, bytes):
            return self._content.decode(content)
        if isinstance(content, str) and isinstance(self._content, ImageContent):
            return self._content.decode(self._file_content(content))
        if isinstance(content, list):
            return _array(content, kind)
        return content

    def batch(self, contents: Sequence[Any]) -> InputLike:
        """See Source."""
        return self._content.batch(contents)

    def nbytes(self, content: Any) -> int:
        """See Source."""
        return self._content.nbytes(content)

    def _group(self, group: int) -> Any:
        with self._lock:
            if group not in self._kept:
                table = self._file.read_row_group(group, columns=[self._column])
                self._kept[group] = table[self._column].combine_chunks()
                if len(self._kept) > _GROUPS_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return self._kept[group]

    def _file_content(self, name: str) -> bytes:
        if is_address(name):
            return file_bytes(name)
        if is_address(self._path):
            return file_bytes(f"{self._path.rpartition('/')[0]}/{name}")
        try:
            return (Path(self._path).parent / name).read_bytes()
        except OSError as error:
            raise InvalidInputError(f"{name}: {error.strerror}") from error


def _opened(path: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"input {path}: Parquet files need pyarrow; install it with: "
            f"pip install 'layertap[data]'"
        ) from error
    try:
        return pq.ParquetFile(open_file(path) if is_address(path) else path)
    except OSError as error:
        raise InvalidInputError(f"input {path}: {error.strerror or error}") from error
    except pa.ArrowInvalid as error:
        raise InvalidInputError(f"input {path}: got no Parquet file ({error})") from error


def _ids(file: Any) -> list[str] | None:
    names = file.schema_arrow.names
    column = next((name for name in _IDS if name in names), None)
    if column is None:
        return None
    values = file.read(columns=[column.replace(".", "\\.")])[column].to_pylist()
    return [str(value) for value in values]


def _column(path: str, schema: Any, name: str, kind: str) -> tuple[str, bool]:
    """Return the column to take, and whether its strings are paths."""
    if name and name not in schema.names:
        raise InvalidInputError(
            f"input {path}: got no column {name!r}, expected one of {', '.join(schema.names)}"
        )
    fields = [schema.field(name)] if name else [each for each in schema if each.name not in _IDS]
    kinds = {each.name: kind or _kind(each) for each in fields}
    found = [each for each, what in kinds.items() if what]
    if len(found) != 1:
        got = f"the columns {', '.join(found)}" if found else f"no such column in {schema.names}"
        raise InvalidInputError(
            f"input {path}: got {got}, expected one with images, paths, texts or arrays; choose it "
            f"by --field NAME, and say what strings are by --field NAME:path or NAME:text"
        )
    return found[0], kinds[found[0]] == "path"


def _kind(field: Any) -> str:
    from pyarrow import types

    kind = field.type
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "bytes"
    if types.is_struct(kind):
        return "bytes" if kind.get_field_index("bytes") >= 0 else ""
    if types.is_string(kind) or types.is_large_string(kind):
        name = field.name.lower()
        return "path" if name in _PATHS else "text" if name in _TEXTS else ""
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
        if types.is_integer(kind) or types.is_floating(kind):
            return "array"
    return ""


def _content(kind: Any, paths: bool, truncation: Truncation) -> Content:
    from pyarrow import types

    if types.is_string(kind) or types.is_large_string(kind):
        return ImageContent() if paths else TextContent(truncation)
    if types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        return ImageContent()
    return ArrayContent()


def _array(content: list[Any], kind: Any) -> np.ndarray:
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    try:
        return np.array(content, kind.to_pandas_dtype())
    except ValueError as error:
        raise InvalidInputError(f"the lists are not an array: {error}") from error
