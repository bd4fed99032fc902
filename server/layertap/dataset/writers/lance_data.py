"""Lance datasets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from layertap.dataset.shard import Parts
from layertap.dataset.writers.base import JoinedFormat
from layertap.dataset.writers.parquet import table_of

__all__ = ["Lance"]

_UNUSUAL = re.compile(r"^_|[.`%]")
"""What Lance does not take in the names of columns, or has a meaning for."""


class Lance(JoinedFormat):
    """A Lance dataset of one version: the columns of ``Parquet``, and a fragment for each shard.

    Lance takes no dots in names of columns; they are written as in URLs: ``layer1%2E0``. The data
    files have the same bytes in each run. The files of the version have a time and random names, as
    Lance gives them.
    """

    name = "lance"
    suffixes = (".lance",)
    library = "lance"

    def join(self, path: Path, parts: Parts) -> None:
        """See JoinedFormat."""
        import lance
        from lance.fragment import FragmentMetadata, write_fragments

        schema, fragments = None, []
        for number, rows in enumerate(parts.shards()):
            table = table_of(rows, parts.outputs)
            table = table.rename_columns([_column_name(name) for name in table.column_names])
            schema = table.schema
            [written] = write_fragments(table, path, max_rows_per_file=max(1, len(table)))
            [file] = written.files
            name = f"part-{number:05}.lance"
            (path / "data" / file.path).rename(path / "data" / name)
            fragments.append(FragmentMetadata(written.id, [_renamed(file, name)], len(table)))
        lance.LanceDataset.commit(path, lance.LanceOperation.Overwrite(schema, fragments))


def _column_name(name: str) -> str:
    return _UNUSUAL.sub(lambda sign: f"%{ord(sign[0]):02X}", name)


def _renamed(file: Any, name: str) -> Any:
    """Return the description of a data file under another name; Lance's own names are random."""
    return type(file)(
        name,
        file.fields,
        file.column_indices,
        file.file_major_version,
        file.file_minor_version,
        file.file_size_bytes,
    )
