"""What a format has to do, and which format an output has."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from layertap.dataset.shard import Output, Parts, Rows
from layertap.errors import ConfigError, InvalidInputError

__all__ = ["Format", "JoinedFormat", "ShardedFormat"]


class Format(ABC):
    """A kind of file or folder that holds rows.

    Attributes:
        name: Its name for ``--format``.
        suffixes: The suffixes of outputs in this format; the first is the usual one.
        library: The module that it needs; empty if numpy is enough.
        bfloat16: Whether it can hold bfloat16, which is stored as float32 otherwise.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    library: ClassVar[str] = ""
    bfloat16: ClassVar[bool] = False

    def check_installed(self) -> None:
        """Raise ConfigError, which names the extra to install, if the library is missing."""
        if not self.library:
            return
        try:
            importlib.import_module(self.library)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"format {self.name}: needs {self.library}; install it with: "
                f"pip install 'layertap[data]'"
            ) from error

    def stored(self, name: str, dtype: np.dtype) -> np.dtype:
        """Return the dtype in which an output is stored.

        Raises:
            InvalidInputError: If the format can't hold it.
        """
        if dtype.name == "bfloat16":
            return dtype if self.bfloat16 else np.dtype(np.float32)
        if dtype.kind not in "biufc":
            raise InvalidInputError(
                f"output {name!r}: format {self.name} can't hold {dtype.name}; choose another "
                f"type, such as {name}:dtype=float32"
            )
        return dtype


class ShardedFormat(Format):
    """A format of which each shard is a file of its own, in one folder."""

    @abstractmethod
    def write(self, path: Path, rows: Rows, outputs: Mapping[str, Output]) -> None:
        """Write the rows of a shard."""


class JoinedFormat(Format):
    """A format with one array for each output, which is written after the last shard."""

    @abstractmethod
    def join(self, path: Path, parts: Parts) -> None:
        """Write the rows of all shards, holding one shard in memory at a time."""
