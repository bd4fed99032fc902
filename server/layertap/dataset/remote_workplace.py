"""Outputs at addresses of object stores, from which an interrupted run continues.

Note [Without rename and without append]
    An object store has no rename: an object appears whole, once all of it was sent, or not at all.
    So each shard is written to a temporary file of this machine, and sent; then its line of the
    journal is sent, as an object of its own, since nothing can be appended. A crash between the two
    leaves a shard without a line, which is written again with the same bytes. The manifest is sent
    last: where there is one, the output is complete.

    An object store has no locks either. Two runs of the same command at the same time on one
    machine are noticed, on two machines they are not.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from layertap.dataset.addresses import address_errors, file_system
from layertap.dataset.durable import lock, sha256_of
from layertap.dataset.manifest import Facts, Failure, Plan, ShardRecord
from layertap.errors import InvalidInputError, UnavailableError

__all__ = ["RemoteWorkplace", "check_remote_output"]

T = TypeVar("T")

_STORES = frozenset(
    {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory"}
)
"""Schemes of storage in which an object appears whole or not at all."""

_TRIES = 5
_PAUSE = 1.0
"""Seconds before the second try; each further pause is twice as long."""


def check_remote_output(address: str) -> None:
    """Check what would otherwise fail after the model is loaded.

    Raises:
        ConfigError: If a library is missing.
        InvalidInputError: If outputs can't be written to such an address.
    """
    scheme = address.partition(":")[0].lower()
    if scheme not in _STORES:
        raise InvalidInputError(
            f"output {address}: got {scheme}://, expected a path or an address of an object store: "
            f"{', '.join(sorted(_STORES))}"
        )
    file_system(address)


class RemoteWorkplace:
    """The objects of an output, and those beside it; see ``Workplace``.

    Args:
        address: The address of the output, a folder of shards.
    """

    def __init__(self, address: str) -> None:
        self.output = address.rstrip("/")
        self._fs, path = file_system(self.output)
        self._root = path.rstrip("/")
        self._work = f"{self._root}.work"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes of this machine away from the output.

        Raises:
            InvalidInputError: If another process of this machine writes it.
        """
        name = hashlib.sha256(self.output.encode()).hexdigest()[:32]
        path = Path(tempfile.gettempdir()) / f"layertap-{os.getuid()}-{name}.lock"
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            lock(opened, self.output)
            self._fs.invalidate_cache()
            yield
            path.unlink(missing_ok=True)
        finally:
            os.close(opened)

    def exists(self) -> bool:
        """Return whether there is an output, complete or not."""
        return bool(self._objects(self._root))

    def remove_output(self) -> None:
        """Remove the output itself."""
        self._remove(self._root)

    def begin_shards(self) -> None:
        """Do nothing: an object store has no folders to make, and no half-written objects."""

    def whole(self, records: Mapping[int, ShardRecord]) -> dict[int, ShardRecord]:
        """Return the records of shards whose objects are there, with their size."""
        there = self._objects(self._root)
        return {
            number: record
            for number, record in records.items()
            if not record.file or there.get(f"{self._root}/{record.file}") == record.nbytes
        }

    def write_shard(self, name: str, write: Callable[[Path], None]) -> tuple[int, str]:
        """Write a shard; return its size and its checksum."""
        with tempfile.TemporaryDirectory(prefix="layertap-") as folder:
            file = Path(folder) / name
            write(file)
            size, digest = file.stat().st_size, sha256_of(file)
            self._tried(lambda: self._fs.put_file(str(file), f"{self._root}/{name}"))
        return size, digest

    def clear(self) -> None:
        """Remove what belongs to another run, except the output itself."""
        for path in (self._manifest, self._failures, self._work):
            self._remove(path)

    def complete(self) -> Mapping[str, Any] | None:
        """Return the manifest of a complete output; None if there is none."""
        return self._load(self._manifest)

    def started(self) -> Mapping[str, Any] | None:
        """Return the facts and the plan of a run that was started; None if there is none."""
        return self._load(f"{self._work}/manifest.json")

    def start(self, facts: Facts, plan: Plan) -> None:
        """Note that a run has started."""
        self._store(f"{self._work}/manifest.json", {"facts": facts, "plan": asdict(plan)})

    def records(self) -> dict[int, ShardRecord]:
        """Return the shards that are noted, by number."""
        names = [path for path in self._objects(self._work) if "/shard-" in path]
        found = self._tried(lambda: self._fs.cat(names) if names else {})
        records = [ShardRecord.of(json.loads(raw)) for raw in found.values()]
        return {record.number: record for record in sorted(records, key=lambda each: each.number)}

    def note(self, record: ShardRecord) -> None:
        """Note that a shard is there."""
        self._store(f"{self._work}/shard-{record.number:05}.json", asdict(record))

    def list_failures(self, failures: Sequence[Failure]) -> None:
        """Write the list of failures, or remove an old one if there are none."""
        if not failures:
            self._remove(self._failures)
            return
        lines = "".join(json.dumps(asdict(each)) + "\n" for each in failures)
        self._tried(lambda: self._fs.pipe_file(self._failures, lines.encode()))

    def listed(self) -> list[Failure]:
        """Return the failures in the list."""
        raw = self._read(self._failures) or b""
        return [Failure(**json.loads(line)) for line in raw.splitlines()]

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest of the complete output, and remove what is no longer needed."""
        self._store(self._manifest, manifest)
        self.tidy()

    def tidy(self) -> None:
        """Remove the journal of a complete output."""
        self._remove(self._work)

    @property
    def _manifest(self) -> str:
        return f"{self._root}.manifest.json"

    @property
    def _failures(self) -> str:
        return f"{self._root}.failures.jsonl"

    def _objects(self, path: str) -> dict[str, int]:
        """Return the objects at a path or below it, and their sizes."""

        def find() -> dict[str, int]:
            self._fs.invalidate_cache()
            return {name: each["size"] for name, each in self._fs.find(path, detail=True).items()}

        return self._tried(find)

    def _remove(self, path: str) -> None:
        if there := self._objects(path):
            self._tried(lambda: self._fs.rm(list(there)))

    def _store(self, path: str, content: Mapping[str, Any]) -> None:
        raw = (json.dumps(content, indent=1) + "\n").encode()
        self._tried(lambda: self._fs.pipe_file(path, raw))

    def _read(self, path: str) -> bytes | None:
        def read() -> bytes | None:
            try:
                return bytes(self._fs.cat_file(path))
            except FileNotFoundError:
                return None

        return self._tried(read)

    def _load(self, path: str) -> Mapping[str, Any] | None:
        raw = self._read(path)
        try:
            return None if raw is None else json.loads(raw)
        except ValueError as error:
            raise InvalidInputError(f"{path}: got no manifest of layertap: {error}") from error

    def _tried(self, do: Callable[[], T]) -> T:
        """Do something, several times where the storage can't be reached."""
        pause = _PAUSE
        for _ in range(_TRIES - 1):
            try:
                with address_errors(self.output):
                    return do()
            except UnavailableError:
                time.sleep(pause)
                pause *= 2
        with address_errors(self.output):
            return do()
