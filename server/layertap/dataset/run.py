"""Extracts layers of a data set into an output, and continues an interrupted run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from layertap import __version__
from layertap.dataset.addresses import is_address, local_path
from layertap.dataset.batches import Batches, BatchResult, Way
from layertap.dataset.changed import Changed, added_up, changed_from
from layertap.dataset.durable import output_errors, replacing, sha256_of
from layertap.dataset.fastest import fastest_variant
from layertap.dataset.manifest import Facts, Failure, Plan, ShardRecord, Workplace, differences
from layertap.dataset.pipeline import FilledShard, Pipeline, Progress
from layertap.dataset.remote_workplace import RemoteWorkplace, check_remote_output
from layertap.dataset.rows import RowRules
from layertap.dataset.runners import LocalRunner, Runner, Worker
from layertap.dataset.shard import OFFSETS, Output, Parts
from layertap.dataset.sources import Part, Source, gather
from layertap.dataset.writers import (
    FORMATS,
    Format,
    JoinedFormat,
    ShardedFormat,
    format_of,
    write_part,
)
from layertap.errors import InvalidInputError
from layertap.intervention import parse_interventions
from layertap.projection import Projection
from layertap.selection import (
    Extractor,
    LayerSelection,
    SelectionLike,
    Sweep,
    as_extractor,
    parse_selections,
)

if TYPE_CHECKING:
    from layertap.intervention import InterventionsLike
    from layertap.local import LocalModel

__all__ = ["Outcome", "check_output", "extract"]

Place = Workplace | RemoteWorkplace
"""Where an output and what belongs to it are."""

_SHARD_BYTES = 64 << 20
_SHARD_ITEMS = 1 << 16
_WORTH_COMPILING = 1000
"""Items from which it pays to wait for a compiled program."""
_WORTH_MEASURING = 300
"""Seconds of passes from which it pays to compile the variants of a program and to measure them.

Compiling takes seconds, as for any program, and measuring at most 20 batches for each variant.
"""
_PROBED = 1000
"""Items of which one must succeed before the run starts."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did.

    Attributes:
        output: The path of the output, or its address.
        rows: The number of rows in it.
        failures: The items that have no row, in order.
        outputs: By output name, what each row has.
        extractor: The extractor that captured the layers.
        variant: How its program was finished; empty for the usual way.
        shards_before: The shards that an earlier run had written.
        shards_written: The shards that this run has written.
        changed: What each intervention changed in all items of the output.
    """

    output: Path | str
    rows: int
    failures: tuple[Failure, ...]
    outputs: Mapping[str, Output]
    extractor: Extractor
    variant: str
    shards_before: int
    shards_written: int
    changed: tuple[Changed, ...] = ()


def extract(
    model: LocalModel | Runner,
    inputs: Source | Iterable[str | os.PathLike[str]],
    layers: SelectionLike,
    output: str | os.PathLike[str],
    *,
    format: str = "",  # noqa: A002 - the name of the flag
    extractor: Extractor | str = Extractor.AUTO,
    objective: str = "",
    interventions: InterventionsLike | None = None,
    variant: str = "",
    on_error: Literal["fail", "skip"] = "fail",
    batch_size: int = 16,
    shard_items: int | None = None,
    part: tuple[int, int] = (1, 1),
    memory: int = 1 << 30,
    overwrite: bool = False,
    report: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Run a model on every item of a data set and write the layers, a row for each item.

    If an earlier call with the same arguments was interrupted, even by a crash, this one continues
    after its last whole shard, and the output has the same bytes as that of a call that was never
    interrupted. If the earlier output is complete, nothing is done.

    Args:
        model: A model of ``layertap.load``, or a `Runner`.
        inputs: A `Source`, or paths as ``gather`` takes them.
        layers: The layers, as for ``LocalModel.extract``.
        output: The file or folder to write; or the address of an object store, such as
            ``"s3://bucket/features.parquet"``, for a format with a file for each shard.
        format: ``"npz"``, ``"npy"``, ``"safetensors"``, ``"parquet"``, ``"zarr"`` or ``"hdf5"``; if
            empty, it follows from the suffix of ``output``.
        extractor: The extractor of all passes. AUTO chooses one for the first batch, and all others
            take it; for more than 1,000 items it is the first that serves all layers, in the order
            of `Extractor`, although it may have to be compiled. If its passes would
            take five minutes or more, the variants of its program are measured on the first batch,
            and the fastest is taken.
        objective: What requested gradients are the gradients of, such as ``"fc[281]"``; a `Runner`
            has its own.
        interventions: Changes of values while the model runs, all of one set; a `Runner` has its
            own.
        variant: How the program of the extractor is finished, such as ``"channels_last"``; the
            extractor must be named. If empty, and without AUTO, it is finished in the usual way.
        on_error: Whether an item that fails ends the run, or is left out of the output and listed.
        batch_size: Items in one pass.
        shard_items: Items in one shard; if None, as many as take 64 MiB or a quarter of ``memory``.
        part: ``(i, n)`` takes the i-th of n parts of the items, from 1.
        memory: Bytes that rows may take before they are on the disk. One shard and one batch are
            always allowed.
        overwrite: Whether to replace an output that was made in another way.
        report: Is called some times a second.

    Returns:
        What is in the output. Rows are in the order of the items.

    Raises:
        InvalidInputError: An item failed, or the output can't be written or was made in another
            way; the message says what differs. Or the extractor has no such variant.
        ConfigError: The format is unknown, or its library is missing.
        LayertapError: See ``LocalModel.extract`` and ``Client.extract``.
        KeyboardInterrupt: On Ctrl-C; shards that are written stay.
    """
    where = local_path(os.fspath(output))
    writer = check_output(where, format)
    source = inputs if isinstance(inputs, Source) else gather(os.fspath(each) for each in inputs)
    changes = parse_interventions(interventions)
    runner = model if isinstance(model, Runner) else LocalRunner(model, objective, changes)
    selections = parse_selections(layers)
    rules = RowRules.of(runner.describe(), selections)
    if {"ids", *(name + OFFSETS for name in rules.ragged)} & rules.axes.keys():
        raise InvalidInputError(
            f"layers: an output can't be called 'ids', which are the items' names, or end with "
            f"{OFFSETS!r}; give it another name, such as layer4=name"
        )
    source = source if part == (1, 1) else Part(source, *part)
    chosen = as_extractor(extractor)
    _check_variant(runner, chosen, variant)
    run = _Run(
        path=where if is_address(where) else Path(where),
        writer=writer,
        source=source,
        runner=runner,
        rules=rules,
        batches=Batches(source, selections, rules, skip=on_error == "skip"),
        extractor=chosen,
        variant=variant,
        batch_size=1 if rules.one_by_one else batch_size,
        shard_items=shard_items,
        memory=memory,
    )
    options = {
        "format": writer.name,
        "extractor": run.extractor.value,
        "variant": run.variant,
        "objective": runner.objective,
        "interventions": [each.summary for each in runner.interventions],
        "on_error": on_error,
        "batch_size": batch_size,
        "shard_items": shard_items,
        "part": f"{part[0]}/{part[1]}",
    }
    named = {
        selection.alias or f"{selection.name}:{selection.capture}:{selection.method}": {
            **asdict(replace(selection, projection=None)),
            "sweep": {**asdict(selection.sweep), "baseline": _baseline(selection.sweep)},
            "projection": _projection(selection),
        }
        for selection in selections
    }
    facts = {
        "layertap": __version__,
        "model": _model_facts(runner),
        "options": {**options, "layers": named},
        "inputs": _input_facts(source),
    }
    return run.go(_plain(facts), overwrite=overwrite, report=report or (lambda _: None))


def _check_variant(runner: Runner, extractor: Extractor, variant: str) -> None:
    known = runner.describe().variants.get(extractor, ())
    if variant and variant not in known:
        # The model would refuse it, too, but as if the items were at fault.
        expected = ", ".join(map(repr, known)) or "none"
        raise InvalidInputError(
            f"variant: got {variant!r}, expected one of the extractor {extractor}: {expected}"
        )


def check_output(output: str, format: str = "") -> Format:  # noqa: A002 - the name of the flag
    """Check what would otherwise fail after the model is loaded; return the output's format.

    Raises:
        ConfigError: If the format is unknown, or a library is missing.
        InvalidInputError: If the folder of the output does not exist or can't be written to, or it
            is an address to which outputs of the format can't be written.
    """
    output = local_path(output)
    writer = format_of(output, format)
    if is_address(output):
        if isinstance(writer, JoinedFormat):
            able = [name for name, each in FORMATS.items() if isinstance(each, ShardedFormat)]
            raise InvalidInputError(
                f"output {output}: {writer.name} is written as a whole after the last shard, which "
                f"an object store can't do so that a run can be continued; expected "
                f"{', '.join(able)}, or a path on a disk"
            )
        check_remote_output(output)
        return writer
    _check_folder(Path(output))
    return writer


def _check_folder(output: Path) -> None:
    folder = output.absolute().parent
    if not folder.is_dir():
        raise InvalidInputError(f"output {output}: no such folder {output.parent}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidInputError(f"output {output}: the folder {output.parent} can't be written to")


def _model_facts(runner: Runner) -> Facts:
    described = runner.describe()
    return {
        "name": described.name,
        "source": described.source,
        "weights": described.weights,
        "device": described.device.partition(":")[0],
        "inputs": {
            each.name: {
                "takes": str(each),
                "images": each.preprocessing,
                "texts": each.tokenization,
            }
            for each in described.inputs
        },
        "fingerprint": runner.fingerprint(),
    }


def _input_facts(source: Source) -> Facts:
    last = len(source) - 1
    return {
        "items": len(source),
        "first": source.id(0),
        "last": source.id(last),
        "names, sizes and times of change": source.digest(0, len(source)),
    }


def _baseline(sweep: Sweep) -> float | dict[str, str]:
    """Return a baseline as it is, or for a tensor what tells it from others."""
    base = sweep.baseline
    return base if not isinstance(base, np.ndarray) else _array_facts(base)


def _projection(selection: LayerSelection) -> dict[str, dict[str, str]] | None:
    """Return what tells a projection from others; None if there is none."""
    given = selection.projection
    if not isinstance(given, Projection):
        return None
    arrays = {"matrix": given.matrix, "mean": given.mean}
    return {name: _array_facts(array) for name, array in arrays.items() if array is not None}


def _array_facts(array: np.ndarray) -> dict[str, str]:
    return {
        "dtype": array.dtype.name,
        "shape": str(list(array.shape)),
        "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
    }


def _plain(facts: Facts) -> Facts:
    """Return facts as they are after they were stored and read."""
    return json.loads(json.dumps(facts))  # type: ignore[no-any-return]


@dataclass(slots=True)
class _Run:
    """One call of ``extract``."""

    path: Path | str
    writer: Format
    source: Source
    runner: Runner
    rules: RowRules
    batches: Batches
    extractor: Extractor
    variant: str
    batch_size: int
    shard_items: int | None
    memory: int

    def go(self, facts: Facts, *, overwrite: bool, report: Callable[[Progress], None]) -> Outcome:
        place = self._place()
        with place.locked(), output_errors(self.path):
            complete, started = place.complete(), place.started()
            refusal = self._refusal(complete, started, facts, place)
            if refusal and not overwrite:
                raise InvalidInputError(f"output {self.path}: {refusal}; --overwrite replaces it")
            if complete is not None and not refusal:
                place.tidy()
                return self._outcome(complete, written=0)
            if started is not None and not refusal:
                plan = Plan.of(started["plan"])
            else:
                # The old output stays until the model has run, and one file until the end.
                plan = self._probe()
                place.clear()
                if isinstance(self.writer, ShardedFormat):
                    place.remove_output()
                place.start(facts, plan)
            return self._run(place, facts, plan, report)

    def _stateful(self) -> bool:
        passes = self.runner.describe().passes
        return passes is not None and passes.state == "kept"

    def _refusal(
        self,
        complete: Mapping[str, Any] | None,
        started: Mapping[str, Any] | None,
        now: Facts,
        place: Place,
    ) -> str:
        """Return why the output can't be continued; empty if it can, or if there is none."""
        before = complete or started
        if before is None:
            return "there is one already, which has no manifest" if place.exists() else ""
        if changes := "; ".join(differences(before["facts"], now)):
            return f"it was made in another way ({changes})"
        if complete is None and self._stateful():
            return (
                "the model keeps state from pass to pass, so a run that continues would give other "
                "values than one that was not interrupted"
            )
        return ""

    def _probe(self) -> Plan:
        """Run the first batch that has a good item, to learn what the outputs are."""
        [worker, *_] = self.runner.workers()
        failures: list[Failure] = []
        try:
            for begin in range(0, min(len(self.source), _PROBED), self.batch_size):
                items = range(begin, min(begin + self.batch_size, len(self.source)))
                result = self.batches.run(worker, items, self._first())
                if result.items:
                    return self._plan(result, self._variant(worker, result))
                failures += result.failures
        finally:
            worker.close()
        raise InvalidInputError(
            f"inputs: all of the first {len(failures)} items failed; the first, "
            f"{failures[0].id}: {failures[0].error}"
        )

    def _first(self) -> Way:
        """Return how the first batch is run."""
        if self.extractor is not Extractor.AUTO or len(self.source) <= _WORTH_COMPILING:
            return Way(self.extractor, self.variant)
        # AUTO itself would take an extractor that need not be compiled until another one is.
        first = next(each for each in Extractor if each is not Extractor.AUTO)
        return Way(first, fallback=True)

    def _variant(self, worker: Worker, first: BatchResult) -> str:
        """Return how the program that served the first batch is finished for all batches."""
        variants = self.runner.describe().variants.get(first.extractor, ())
        batches = len(self.source) / self.batch_size
        expected = batches * (first.timings.compute_ns or 0) / 1e9
        named = self.extractor is not Extractor.AUTO
        # Further passes of a stateful model would change what later ones see.
        if named or not variants or expected < _WORTH_MEASURING or self._stateful():
            return first.variant

        def seconds(variant: str) -> float:
            result = self.batches.run(worker, first.items, Way(first.extractor, variant))
            return (result.timings.compute_ns or 0) / 1e9

        return fastest_variant(seconds, variants)

    def _plan(self, result: BatchResult, variant: str) -> Plan:
        outputs = {}
        for name, rows in result.rows.items():
            dtype = self.writer.stored(name, rows.dtype)
            ragged = name in self.rules.ragged
            outputs[name] = Output(dtype.name, rows.shape[2 if ragged else 1 :], ragged)
        total = sum(rows.nbytes for rows in result.rows.values()) + result.input_bytes
        item_bytes = max(1, total // len(result.items))
        return Plan(
            extractor=result.extractor.value,
            batch_size=self.batch_size,
            shard_items=self.shard_items or self._shard_items(item_bytes),
            item_bytes=item_bytes,
            outputs=outputs,
            variant=variant,
        )

    def _shard_items(self, item_bytes: int) -> int:
        """Return the items of a shard, a multiple of the batch size."""
        items = min(_SHARD_ITEMS, min(_SHARD_BYTES, self.memory // 4) // item_bytes)
        return max(1, items // self.batch_size) * self.batch_size

    def _run(
        self, place: Place, facts: Facts, plan: Plan, report: Callable[[Progress], None]
    ) -> Outcome:
        place.begin_shards()
        records = place.whole(place.records())
        count = -(-len(self.source) // plan.shard_items)
        missing = [number for number in range(count) if number not in records]
        before = len(records)

        def write(shard: FilledShard) -> None:
            with output_errors(self.path):
                record = self._write(place, shard, plan)
                place.note(record)
            records[record.number] = record

        if missing:
            sizes = [
                min(plan.shard_items, len(self.source) - number * plan.shard_items)
                for number in records
            ]
            failed = sum(len(record.failures) for record in records.values())
            workers = self.runner.workers()
            # The state that a pass leaves is what the next one sees, so they run in order.
            workers = workers[:1] if self._stateful() else workers
            pipeline = Pipeline(
                self.source,
                self.batches,
                plan,
                workers,
                write,
                way=Way(
                    Extractor(plan.extractor),
                    plan.variant,
                    fallback=self.extractor is Extractor.AUTO,
                ),
                memory=self.memory,
            )
            pipeline.run(missing, sum(sizes), failed, report)
        return self._finish(place, facts, plan, [records[n] for n in sorted(records)], before)

    def _place(self) -> Place:
        if isinstance(self.path, str):
            return RemoteWorkplace(self.path)
        return Workplace(self.path, sharded=isinstance(self.writer, ShardedFormat))

    def _write(self, place: Place, shard: FilledShard, plan: Plan) -> ShardRecord:
        rows = shard.buffer.rows()
        failures = tuple(shard.failures)
        if not rows.ids:
            return ShardRecord(shard.number, "", 0, 0, "", failures, shard.changed)
        suffix = self.writer.suffixes[0] if isinstance(self.writer, ShardedFormat) else ".npz"
        name = f"part-{shard.number:05}{suffix}"

        def write(path: Path) -> None:
            if isinstance(self.writer, ShardedFormat):
                self.writer.write(path, rows, plan.outputs)
            else:
                write_part(path, rows)

        size, digest = place.write_shard(name, write)
        return ShardRecord(shard.number, name, len(rows.ids), size, digest, failures, shard.changed)

    def _finish(
        self,
        place: Place,
        facts: Facts,
        plan: Plan,
        records: Sequence[ShardRecord],
        before: int,
    ) -> Outcome:
        failures = [failure for record in records for failure in record.failures]
        if isinstance(self.writer, JoinedFormat) and isinstance(place, Workplace):
            self._join(self.writer, place, plan, records)
        place.list_failures(failures)
        manifest: dict[str, Any] = {
            "facts": facts,
            "plan": asdict(plan),
            "rows": sum(record.rows for record in records),
            "failed": len(failures),
            "changed": [asdict(each) for each in added_up(r.changed for r in records)],
            "files": self._files(records),
        }
        place.finish(_plain(manifest))
        return self._outcome(manifest, len(records) - before, failures)

    def _join(
        self, writer: JoinedFormat, place: Workplace, plan: Plan, records: Sequence[ShardRecord]
    ) -> None:
        shards = {record: place.shards / record.file for record in records if record.file}
        for record, file in shards.items():
            if sha256_of(file) != record.sha256:
                raise InvalidInputError(
                    f"output {self.path}: {file} is damaged; remove it and run the same command "
                    f"again"
                )
        with replacing(place.output) as temporary:
            writer.join(temporary, Parts(list(shards.values()), plan.outputs))

    def _files(self, records: Sequence[ShardRecord]) -> Mapping[str, Any]:
        """Return the rows, the size and the checksum of each file of the output."""
        if isinstance(self.writer, ShardedFormat) or isinstance(self.path, str):
            return {
                record.file: {"rows": record.rows, "bytes": record.nbytes, "sha256": record.sha256}
                for record in records
                if record.file
            }
        if self.path.is_dir():
            below = sorted(path for path in self.path.rglob("*") if path.is_file())
            names = {str(path.relative_to(self.path)): path for path in below}
        else:
            names = {self.path.name: self.path}
        return {
            name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for name, path in names.items()
        }

    def _outcome(
        self, manifest: Mapping[str, Any], written: int, failures: Sequence[Failure] | None = None
    ) -> Outcome:
        plan = Plan.of(_plain(manifest)["plan"])
        if failures is None:
            failures = self._place().listed()
        count = -(-len(self.source) // plan.shard_items)
        return Outcome(
            output=self.path,
            rows=manifest["rows"],
            failures=tuple(failures),
            outputs=plan.outputs,
            extractor=Extractor(plan.extractor),
            variant=plan.variant,
            shards_before=count - written,
            shards_written=written,
            changed=changed_from(manifest.get("changed", ())),
        )
