"""What an output is made of, and which of its shards are written.

While a run is under way, ``OUTPUT.work`` holds ``manifest.json`` with the facts of the run, and
``shards.jsonl`` with a line for each shard that is on the disk. After the last shard the whole is
written to ``OUTPUT.manifest.json``, and the folder is removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layertap.dataset.changed import Changed, changed_from
from layertap.dataset.durable import (
    TEMPORARY,
    lock,
    output_errors,
    remove,
    replacing,
    sha256_of,
    sync_folder,
)
from layertap.dataset.shard import Output
from layertap.errors import InvalidInputError

__all__ = ["Facts", "Failure", "Plan", "ShardRecord", "Workplace", "differences"]

Facts = Mapping[str, Any]
"""What determines the values: model, options and inputs. It consists of what JSON can hold."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An item that has no row.

    Attributes:
        id: Its id.
        error: Why it failed.
    """

    id: str
    error: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What the first batch decided; a continued run follows it.

    Attributes:
        extractor: The extractor of all passes.
        batch_size: Items in one pass.
        shard_items: Items of one shard.
        item_bytes: The memory of one item's rows; an average if items have different lengths.
        outputs: What each item has, by output name.
        variant: How the extractor's program is finished; empty for the usual way.
    """

    extractor: str
    batch_size: int
    shard_items: int
    item_bytes: int
    outputs: Mapping[str, Output]
    variant: str = ""

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Plan:
        """Return the plan in a manifest."""
        outputs = {
            name: Output(each["dtype"], tuple(each["shape"]), each["ragged"])
            for name, each in stored["outputs"].items()
        }
        return cls(**{**stored, "outputs": outputs})


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A shard that is on the disk.

    Attributes:
        number: Its number, from 0.
        file: The name of its file; empty if none of its items has a row.
        rows: The number of rows.
        nbytes: The size of the file.
        sha256: The checksum of the file.
        failures: The items that failed.
        changed: What each intervention changed.
    """

    number: int
    file: str
    rows: int
    nbytes: int
    sha256: str
    failures: tuple[Failure, ...] = ()
    changed: tuple[Changed, ...] = ()

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> ShardRecord:
        """Return the record in a line of the journal."""
        failures = tuple(Failure(**each) for each in stored["failures"])
        changed = changed_from(stored.get("changed", ()))
        return cls(**{**stored, "failures": failures, "changed": changed})


class Workplace:
    """The files beside an output, from which an interrupted run continues.

    Args:
        output: The path of the output.
        sharded: Whether the output is a folder of shards; otherwise these are temporary.

    Attributes:
        output: The path of the output.
        shards: The folder of the shards.
        folder: The folder of what is needed only until the output is complete.
        manifest: The manifest of a complete output.
        failures: The list of the items that failed; absent if none did.
    """

    def __init__(self, output: Path, *, sharded: bool = False) -> None:
        self.output = output
        self.folder = output.with_name(f"{output.name}.work")
        self.manifest = output.with_name(f"{output.name}.manifest.json")
        self.failures = output.with_name(f"{output.name}.failures.jsonl")
        self.shards = output if sharded else self.folder
        self._journal = self.folder / "shards.jsonl"
        self._started = self.folder / "manifest.json"

    def exists(self) -> bool:
        """Return whether there is an output, complete or not."""
        return self.output.exists()

    def remove_output(self) -> None:
        """Remove the output itself."""
        remove(self.output)

    def begin_shards(self) -> None:
        """Make the folder of shards, and remove what a crash left half-written there.

        Our own names end in ``.tmp``; safetensors writes to one such as ``.tmpcUfogl`` beside it.
        """
        self.shards.mkdir(exist_ok=True)
        for left in (*self.shards.glob(f"*{TEMPORARY}"), *self.shards.glob(f"{TEMPORARY}*")):
            remove(left)

    def whole(self, records: Mapping[int, ShardRecord]) -> dict[int, ShardRecord]:
        """Return the records of shards whose files are there, with their size."""
        return {
            number: record
            for number, record in records.items()
            if not record.file or _size(self.shards / record.file) == record.nbytes
        }

    def write_shard(self, name: str, write: Callable[[Path], None]) -> tuple[int, str]:
        """Write a shard to the disk; return its size and its checksum."""
        with replacing(self.shards / name) as temporary:
            write(temporary)
            return temporary.stat().st_size, sha256_of(temporary)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes away from the output.

        Raises:
            InvalidInputError: If another process writes it, or the folder can't be made.
        """
        with output_errors(self.output):
            self.folder.mkdir(exist_ok=True)
            opened = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            lock(opened, self.output)
            yield
        finally:
            try:
                if not self._started.exists():
                    remove(self.folder)
            finally:
                os.close(opened)

    def clear(self) -> None:
        """Remove what belongs to another run, except the output itself and the lock."""
        remove(self._started)
        for path in self.folder.glob("part-*"):
            remove(path)
        for path in (self._journal, self.manifest, self.failures):
            remove(path)

    def complete(self) -> Mapping[str, Any] | None:
        """Return the manifest of a complete output; None if there is none."""
        return self._load(self.manifest)

    def started(self) -> Mapping[str, Any] | None:
        """Return the facts and the plan of a run that was started; None if there is none."""
        return self._load(self._started)

    def start(self, facts: Facts, plan: Plan) -> None:
        """Note that a run has started."""
        self._store(self._started, {"facts": facts, "plan": asdict(plan)})

    def records(self) -> dict[int, ShardRecord]:
        """Return the shards that are on the disk, by number.

        A line that a crash cut off is not a record: its shard is written again.
        """
        try:
            raw = self._journal.read_bytes()
        except FileNotFoundError:
            return {}
        whole, _, rest = raw.rpartition(b"\n")
        if rest:
            with self._journal.open("rb+") as file:
                file.truncate(len(raw) - len(rest))
                os.fsync(file.fileno())
        records = [ShardRecord.of(json.loads(line)) for line in whole.splitlines()]
        return {record.number: record for record in records}

    def note(self, record: ShardRecord) -> None:
        """Note that a shard is on the disk."""
        line = json.dumps(asdict(record)) + "\n"
        new = not self._journal.exists()
        with self._journal.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_folder(self.folder)

    def list_failures(self, failures: list[Failure]) -> None:
        """Write the list of failures, or remove an old one if there are none."""
        if not failures:
            remove(self.failures)
            return
        with replacing(self.failures) as path:
            path.write_text("".join(json.dumps(asdict(each)) + "\n" for each in failures), "utf-8")

    def listed(self) -> list[Failure]:
        """Return the failures in the list."""
        try:
            lines = self.failures.read_text("utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [Failure(**json.loads(line)) for line in lines]

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest of the complete output, and remove what is no longer needed."""
        self._store(self.manifest, manifest)
        self.tidy()

    def tidy(self) -> None:
        """Remove the folder of a complete output."""
        remove(self.folder)

    def _store(self, path: Path, content: Mapping[str, Any]) -> None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")

    def _load(self, path: Path) -> Mapping[str, Any] | None:
        try:
            return json.loads(path.read_bytes())  # type: ignore[no-any-return]
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InvalidInputError(f"{path}: got no manifest of layertap: {error}") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def differences(before: Facts, now: Facts, prefix: str = "") -> Iterator[str]:
    """Yield in words each fact that has changed."""
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        name = f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{name}.")
        elif old != new:
            yield f"{name}: {_word(old)} before, {_word(new)} now"


def _word(value: Any) -> str:
    return "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
