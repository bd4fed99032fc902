"""Writes the layers of a Ray data set to Parquet files, each row once, however often it is killed.

Note [Each row once]
    Actors write each block's rows to a file in a folder of the run, and report it. Only the driver
    moves these files into the output, one by one, and a move is atomic. So what was killed with the
    driver, or goes on without it for a while, adds nothing to the output. A run first reads the ids
    that the output has, and the actors leave out these rows. They divide a block into batches
    before they look which rows are there already, and a batch runs as a whole or not at all. So
    each pass has the same items as in a run without interruption, and its values have the same
    bits. For this, Ray must divide the input into the same blocks again.

    Ray's own checkpoints (``DataContext.checkpoint_config``) remove the finished rows before the
    batches are made.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from layertap.dataset.addresses import is_address
from layertap.dataset.durable import lock, output_errors, remove, replacing, sync_folder
from layertap.dataset.manifest import differences
from layertap.errors import InvalidInputError
from layertap.ray.data import Columns, LayerActor, arguments_of
from layertap.selection import Extractor, SelectionLike

if TYPE_CHECKING:
    import ray.data

__all__ = ["Written", "extract_to_parquet"]

_log = logging.getLogger(__name__)

_DIGEST_BYTES = 16
_WORK = ".layertap"
"""The folder in the output with what is not output; readers of Parquet ignore names with a dot."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a run has done.

    Attributes:
        rows: The rows of the output.
        before: How many of them an earlier run had written.
        failed: The ids of rows that failed and are not in the output.
    """

    rows: int
    before: int
    failed: tuple[str, ...]


def extract_to_parquet(
    dataset: ray.data.Dataset,
    folder: str | Path,
    model: str,
    layers: SelectionLike,
    *,
    column: str,
    id_column: str,
    extractor: Extractor | str = "hook",
    on_error: Literal["fail", "skip"] = "fail",
    batch_size: int = 16,
    actors: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    **settings: Any,
) -> Written:
    """Write a data set with a column for each layer to Parquet files, and return what was done.

    The same call continues a run that was interrupted: rows that are in the output are not run
    again. Each row is in the output exactly once, and has the bits that it has without an
    interruption, if Ray divides the input into the same blocks.

    Args:
        dataset: The rows.
        folder: The output, at the same path on all nodes: on this machine or a shared disk.
        model: As for ``extract``, and so are ``layers``, ``column``, ``extractor``, ``batch_size``,
            ``actors``, ``num_cpus``, ``num_gpus`` and ``settings``.
        layers: See ``extract``.
        column: See ``extract``.
        id_column: The column with the id of each row: different strings or whole numbers.
        extractor: See ``extract``.
        on_error: Whether a row that fails ends the run, or is left out until the next run.
        batch_size: See ``extract``.
        actors: See ``extract``.
        num_cpus: See ``extract``.
        num_gpus: See ``extract``.
        settings: See ``extract``.

    Raises:
        InvalidInputError: As for ``extract``; or if two rows have one id, another process writes
            the output, or the output was made in another way.
    """
    if is_address(str(folder)):
        raise InvalidInputError(
            f"folder: got {folder}, expected a path on a disk that all nodes share"
        )
    arguments = arguments_of(
        model=model,
        layers=layers,
        column=column,
        id_column=id_column,
        extractor=extractor,
        on_error=on_error,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        settings=settings,
    )
    facts = {
        "model": model,
        "layers": [each.text for each in arguments["selections"]],
        "column": column,
        "id column": id_column,
        "extractor": arguments["extractor"].value,
        "batch size": batch_size,
        "settings": {key: str(value) for key, value in sorted(arguments["settings"].items())},
        "layertap": version("layertap"),
    }
    output = _Output(Path(folder), id_column)
    with output.locked():
        output.check(facts)
        known = output.ids()
        with output.staging() as staged:
            results = dataset.map_batches(
                _Writer,
                fn_constructor_kwargs={
                    **arguments,
                    "batch_size": batch_size,
                    "staged": str(staged),
                    "finished": _shared(known),
                },
                batch_size=None,
                batch_format="numpy",
                compute=_pool(actors),
                num_cpus=num_cpus,
                num_gpus=num_gpus,
            )
            failed: list[str] = []
            before = len(known)
            for report in results.iter_rows():
                output.take(staged, report, facts, known)
                failed += json.loads(report["failed"])
    return Written(len(known), before, tuple(failed))


def _pool(actors: int) -> ray.data.ActorPoolStrategy:
    import ray.data

    return ray.data.ActorPoolStrategy(size=actors)


def _shared(digests: set[bytes]) -> Any:
    """Return the digests as a sorted array in Ray's object store, which the actors share."""
    import ray

    return ray.put(np.array(sorted(digests), f"S{_DIGEST_BYTES}"))


def _digests(ids: np.ndarray) -> list[bytes]:
    """Return a digest of each id, whose length does not depend on the id's."""
    return [
        hashlib.blake2b(
            str(each).encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES
        ).digest()
        for each in ids
    ]


class _Output:
    """The folder of an output, for the driver.

    Args:
        folder: The folder.
        id_column: The column with the ids.
    """

    def __init__(self, folder: Path, id_column: str) -> None:
        self._folder = folder.absolute()
        self._id_column = id_column
        self._work = self._folder / _WORK
        self._manifest = self._work / "manifest.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes away from the output.

        Raises:
            InvalidInputError: If another process writes it, or the folder can't be made.
        """
        with output_errors(self._folder):
            self._work.mkdir(parents=True, exist_ok=True)
            opened = os.open(self._work / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            lock(opened, self._folder)
            yield
        finally:
            os.close(opened)

    def check(self, facts: Mapping[str, Any]) -> None:
        """Raise InvalidInputError if the output was made in another way."""
        before = self._stored()
        files = next(self._folder.glob("*.parquet"), None)
        if before is None:
            if files is not None:
                raise InvalidInputError(
                    f"output {self._folder}: there is one already, which has no manifest"
                )
            return
        if changes := "; ".join(
            differences({**before, "weights": None}, {**facts, "weights": None})
        ):
            raise InvalidInputError(
                f"output {self._folder}: it was made in another way ({changes}); choose another "
                f"folder"
            )

    def ids(self) -> set[bytes]:
        """Return the digests of the ids that the output has."""
        import pyarrow.parquet as pq

        found: set[bytes] = set()
        for file in sorted(self._folder.glob("part-*.parquet")):
            column = pq.read_table(file, columns=[self._id_column])[self._id_column]
            found.update(_digests(np.array(column.to_pylist(), np.object_)))
        return found

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Yield the folder into which actors write; remove it, and those of killed runs."""
        for left in self._work.glob("staged-*"):
            remove(left)
        staged = self._work / f"staged-{secrets.token_hex(4)}"
        with output_errors(self._folder):
            staged.mkdir()
        try:
            yield staged
        finally:
            remove(staged)

    def take(
        self,
        staged: Path,
        report: Mapping[str, Any],
        facts: Mapping[str, Any],
        known: set[bytes],
    ) -> None:
        """Move the file of an actor's report into the output, and add its ids to the known ones.

        Raises:
            InvalidInputError: If two rows have one id, or the weights are not those of the output.
        """
        raw: bytes = report["ids"]
        new = [raw[at : at + _DIGEST_BYTES] for at in range(0, len(raw), _DIGEST_BYTES)]
        if len(set(new)) < len(new) or not known.isdisjoint(new):
            raise InvalidInputError(
                f"id_column: two rows have one {self._id_column!r}, of which each may have one row"
            )
        self._note({**facts, "weights": report["weights"]})
        if not new:
            return
        with output_errors(self._folder):
            (staged / report["file"]).replace(self._folder / report["file"])
            sync_folder(self._folder)
        known.update(new)

    def _note(self, facts: Mapping[str, Any]) -> None:
        """Store the facts with the first report; compare those of later ones."""
        before = self._stored()
        if before is None:
            with output_errors(self._folder), replacing(self._manifest) as temporary:
                temporary.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
        elif changes := "; ".join(differences(before, facts)):
            raise InvalidInputError(
                f"output {self._folder}: it was made in another way ({changes}); choose another "
                f"folder"
            )

    def _stored(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._manifest.read_bytes())  # type: ignore[no-any-return]
        except FileNotFoundError:
            return None


class _Writer:
    """Holds the model; runs it on blocks and writes their rows. See ``extract_to_parquet``."""

    def __init__(
        self, *, batch_size: int, staged: str, finished: Any, id_column: str, **arguments: Any
    ) -> None:
        import ray

        self._actor = LayerActor(id_column=id_column, **arguments)
        self._weights = self._actor.fingerprint()
        self._batch_size = batch_size
        self._staged = Path(staged)
        self._finished: np.ndarray = ray.get(finished)
        self._id_column = id_column

    def __call__(self, block: Columns) -> dict[str, np.ndarray]:
        """Write the rows of a block that are not finished; return a report on it."""
        if self._id_column not in block:
            raise InvalidInputError(
                f"id_column: got {self._id_column!r}, expected one of {', '.join(block)}"
            )
        parts: list[Columns] = []
        failed: list[str] = []
        count = len(block[self._id_column])
        for begin in range(0, count, self._batch_size):
            batch = {name: a[begin : begin + self._batch_size] for name, a in block.items()}
            if (wanted := self._unfinished(batch)).any():
                rows = self._actor(batch)
                ids = set(_digests(rows[self._id_column]))
                failed += [
                    str(each)
                    for each, digest, is_wanted in zip(
                        batch[self._id_column],
                        _digests(batch[self._id_column]),
                        wanted,
                        strict=True,
                    )
                    if is_wanted and digest not in ids
                ]
                kept = self._unfinished(rows)
                parts.append({name: array[kept] for name, array in rows.items()})
        return self._report([part for part in parts if len(part[self._id_column])], failed)

    def _unfinished(self, rows: Columns) -> np.ndarray:
        """Return for each row whether it is not in the output yet."""
        digests = np.array(_digests(rows[self._id_column]), f"S{_DIGEST_BYTES}")
        if not len(self._finished):
            return np.ones(len(digests), bool)
        places = np.searchsorted(self._finished, digests).clip(max=len(self._finished) - 1)
        return np.asarray(self._finished[places] != digests)

    def _report(self, parts: list[Columns], failed: list[str]) -> dict[str, np.ndarray]:
        ids, name = b"", ""
        if parts:
            rows = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            ids = b"".join(_digests(rows[self._id_column]))
            name = f"part-{hashlib.blake2b(ids, digest_size=10).hexdigest()}.parquet"
            with replacing(self._staged / name) as temporary:
                _write(temporary, rows)
        return {
            "file": np.array([name], np.object_),
            "ids": np.array([ids], np.object_),
            "failed": np.array([json.dumps(failed)], np.object_),
            "weights": np.array([self._weights], np.object_),
        }


def _write(path: Path, rows: Columns) -> None:
    """Write rows to a Parquet file; arrays with several dimensions as in ``layertap extract``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields, columns = [], []
    for name, array in rows.items():
        column = pa.array(array.tolist() if array.dtype == np.object_ else array.reshape(-1))
        metadata = None
        if array.ndim > 1:
            size = int(np.prod(array.shape[1:], dtype=np.int64))
            column = pa.FixedSizeListArray.from_arrays(column, size)
            metadata = {"shape": json.dumps(list(array.shape[1:]))}
        fields.append(pa.field(name, column.type, metadata=metadata))
        columns.append(column)
    table = pa.Table.from_arrays(columns, schema=pa.schema(fields))
    pq.write_table(table, path, use_dictionary=False, compression="zstd")
