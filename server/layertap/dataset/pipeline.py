"""Runs the batches of a data set: reading, decoding, passes and writing at the same time."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from layertap.dataset.batches import Batches, BatchResult, Way
from layertap.dataset.changed import Changed, added_up
from layertap.dataset.manifest import Failure, Plan
from layertap.dataset.runners import Worker
from layertap.dataset.shard import ShardBuffer
from layertap.dataset.sources import Source
from layertap.dataset.tasks import Task, Tasks
from layertap.errors import OverloadedError, UnavailableError
from layertap.resources import available_cpus

__all__ = ["FilledShard", "Pipeline", "Progress"]

_PATIENCE = 120.0
"""Seconds for which a batch is tried again while no server accepts it."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        done: The items that are finished, those of an earlier run included.
        total: All items.
        failed: The items that failed.
        rate: Items per second in this run.
        remaining: The estimated seconds until the end; None if unknown.
        stage: The stage that limits the rate: ``"reading"``, ``"decoding"``, ``"model"`` or
            ``"writing"``; empty if unknown.
    """

    done: int
    total: int
    failed: int
    rate: float
    remaining: float | None
    stage: str


@dataclass(slots=True)
class FilledShard:
    """A shard whose batches are all done.

    Attributes:
        number: Its number.
        buffer: Its rows.
        begin: The index of its first item.
        missing: The number of batches that are not there yet.
        nbytes: The memory that it takes.
        failed: The items that failed, by the first item of their batch.
        changed: What each intervention changed.
    """

    number: int
    buffer: ShardBuffer
    begin: int
    missing: int
    nbytes: int = 0
    failed: dict[int, list[Failure]] = field(default_factory=dict)
    changed: tuple[Changed, ...] = ()

    @property
    def failures(self) -> list[Failure]:
        """The items that failed, in order."""
        return [each for begin in sorted(self.failed) for each in self.failed[begin]]


class _Meter:
    """How busy each stage is."""

    def __init__(self, workers: int, models: int) -> None:
        self._begin = time.perf_counter()
        self._busy = dict.fromkeys(("reading", "decoding", "model", "writing"), 0.0)
        # How many seconds a stage can be busy in one: each model runs one pass at a time, one
        # thread writes, and no more inputs are decoded at once than there are cores.
        self._most = {
            "reading": workers,
            "decoding": min(workers, available_cpus()),
            "model": models,
            "writing": 1,
        }
        self._lock = threading.Lock()

    def add(self, **seconds: float) -> None:
        with self._lock:
            for stage, value in seconds.items():
                self._busy[stage] += value

    def limiting(self) -> str:
        """Return the stage that is busiest, measured by how busy it can be."""
        shares = {stage: busy / self._most[stage] for stage, busy in self._busy.items()}
        stage = max(shares, key=shares.__getitem__)
        return stage if shares[stage] else ""

    def elapsed(self) -> float:
        return time.perf_counter() - self._begin


class Pipeline:
    """Runs the shards that are not on the disk yet.

    Args:
        source: The items.
        batches: Runs a batch.
        plan: The sizes of batches and shards.
        way: How the layers of each batch are captured.
        workers: Run the model; each has a thread.
        write: Writes a shard; called in one thread.
        memory: Bytes that rows may take before they are on the disk.
    """

    def __init__(
        self,
        source: Source,
        batches: Batches,
        plan: Plan,
        workers: Sequence[Worker],
        write: Callable[[FilledShard], None],
        *,
        way: Way,
        memory: int,
    ) -> None:
        self._source = source
        self._batches = batches
        self._plan = plan
        self._way = way
        self._workers = workers
        self._write = write
        self._memory = memory
        self._filled: queue.SimpleQueue[FilledShard | None] = queue.SimpleQueue()
        self._shards: dict[int, FilledShard] = {}
        self._lock = threading.Lock()
        self._meter = _Meter(len(workers), len({worker.name for worker in workers}))
        self._done = self._failed = 0

    def run(
        self, shards: Iterable[int], done: int, failed: int, report: Callable[[Progress], None]
    ) -> None:
        """Run shards; on Ctrl-C, finish what is under way in the model, and leave whole shards.

        Args:
            shards: The numbers of the shards to run.
            done: The items of all other shards.
            failed: How many of these failed.
            report: Is called some times a second.

        Raises:
            LayertapError: The run can't go on; the shards that are on the disk stay.
            KeyboardInterrupt: On Ctrl-C.
        """
        self._failed = failed
        tasks = Tasks(self._tasks(shards), self._memory)
        threads = [
            threading.Thread(target=self._work, args=(tasks, worker), daemon=True)
            for worker in self._workers
        ]
        writer = threading.Thread(target=self._writing, args=(tasks,), daemon=True)
        for thread in (writer, *threads):
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
                    report(self._progress(done))
        except BaseException:
            tasks.stop()
            raise
        finally:
            for thread in threads:
                thread.join()
            self._filled.put(None)
            writer.join()
        report(self._progress(done))
        if tasks.error is not None:
            raise tasks.error

    def _progress(self, before: int) -> Progress:
        total = len(self._source)
        elapsed = self._meter.elapsed()
        rate = self._done / elapsed if elapsed else 0.0
        done = before + self._done
        remaining = (total - done) / rate if rate else None
        return Progress(done, total, self._failed, rate, remaining, self._meter.limiting())

    def _tasks(self, shards: Iterable[int]) -> Iterator[Task]:
        size, batch = self._plan.shard_items, self._plan.batch_size
        for shard in shards:
            begin, end = shard * size, min((shard + 1) * size, len(self._source))
            for first in range(begin, end, batch):
                items = range(first, min(first + batch, end))
                yield Task(shard, items, len(items) * self._plan.item_bytes)

    def _work(self, tasks: Tasks, worker: Worker) -> None:
        """Run batches until there are no more."""
        pause, failing_since = 0.1, 0.0
        try:
            while (task := tasks.take()) is not None:
                try:
                    result = self._batches.run(worker, task.items, self._way)
                except (OverloadedError, UnavailableError) as error:
                    now = time.monotonic()
                    failing_since = failing_since or now
                    if now - failing_since > _PATIENCE:
                        tasks.stop(error)
                    tasks.give_back(task)
                    time.sleep(pause)
                    pause = min(2 * pause, 5.0)
                    continue
                pause, failing_since = 0.1, 0.0
                self._place(task, result)
                tasks.done(task)
        except BaseException as error:  # noqa: BLE001 - it is raised in the caller's thread
            tasks.stop(error)
        finally:
            worker.close()

    def _place(self, task: Task, result: BatchResult) -> None:
        with self._lock:
            shard = self._shards.get(task.shard) or self._begin(task.shard)
            self._shards[task.shard] = shard
        if result.items:
            shard.buffer.place([index - shard.begin for index in result.items], result.rows)
        times = result.timings
        self._meter.add(
            reading=result.read_seconds,
            decoding=times.prepare_ns / 1e9,
            model=times.compute_ns / 1e9,
        )
        with self._lock:
            shard.nbytes += task.nbytes
            shard.missing -= 1
            shard.failed[task.items[0]] = result.failures
            shard.changed = added_up((shard.changed, result.changed))
            self._done += len(task.items)
            self._failed += len(result.failures)
            filled = not shard.missing
            if filled:
                del self._shards[task.shard]
        if filled:
            self._filled.put(shard)

    def _begin(self, number: int) -> FilledShard:
        size = self._plan.shard_items
        begin, end = number * size, min((number + 1) * size, len(self._source))
        ids = [self._source.id(index) for index in range(begin, end)]
        batches = -(-(end - begin) // self._plan.batch_size)
        return FilledShard(number, ShardBuffer(ids, self._plan.outputs), begin, batches)

    def _writing(self, tasks: Tasks) -> None:
        broken = False
        while (shard := self._filled.get()) is not None:
            if broken:
                continue
            begin = time.perf_counter()
            try:
                self._write(shard)
            except BaseException as error:  # noqa: BLE001 - it is raised in the caller's thread
                broken = True
                tasks.stop(error)
            self._meter.add(writing=time.perf_counter() - begin)
            tasks.committed(shard.number, shard.nbytes)
