"""Is every answer about an awkward model right, or refused before the first request?

``python tests/zoo/prove_zoo.py --write docs/coverage.md`` serves every specimen of the zoo in every
way of the full grid, and writes the table. Each specimen has a process of its own, so that one that
ends its process, or hangs, is seen as such. ``make test`` runs the short grid (``test_zoo.py``).
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# As a script it stands in its own folder; it belongs to the package that the folder is.
TESTS = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(TESTS), str(TESTS / "coverage"), str(TESTS.parent / "server")]

import torch
from page import write_section

from layertap.extraction import apart
from layertap.extraction.tf32 import allow_tf32
from layertap.models.compiler_import import import_compiler
from zoo import every_specimen
from zoo.drive import FULL, SHORT, Grid, Report, drive
from zoo.specimen import Specimen

GRIDS = {"short": SHORT, "full": FULL}
FIRST = "SharedModule"
"""A specimen that every extractor serves."""


@dataclass
class Row:
    """What became of a specimen, as one line of the table and of JSON.

    Attributes:
        specimen: Its name.
        awkward: What is awkward about it.
        layers: How many of its layers run.
        right: For each extractor, layers of which every answer was right.
        refused: For each extractor, layers that the catalogue refuses.
        answers: How many answers were right.
        wrong, late, failed: See ``Cell``; one line for each cell.
        unloadable: Why it was refused when it was loaded.
        chance: Layers whose values follow chance.
        door: Why requests were refused for what the catalogue says of the input.
        notes: What the catalogue says of the model in words.
    """

    specimen: str
    awkward: str = ""
    layers: int = 0
    right: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    unloadable: str = ""
    chance: list[str] = field(default_factory=list)
    door: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def row_of(specimen: Specimen, report: Report, seconds: float) -> Row:
    """Return the row of a report."""
    row = Row(specimen.name, specimen.awkward, layers=len(report.layers), seconds=seconds)
    for (extractor, layer), cell in report.cells.items():
        row.answers += cell.answers
        if ":" not in layer and not (cell.wrong or cell.late or cell.failed):
            row.right[extractor.name] = row.right.get(extractor.name, 0) + 1
    row.refused = {extractor.name: len(names) for extractor, names in report.refused.items()}
    row.wrong, row.late = report.faults("wrong"), report.faults("late")
    row.failed, row.unloadable = report.faults("failed"), report.unloadable
    row.chance, row.door, row.notes = map(sorted, (report.chance, report.door, report.notes))
    if row.chance and not any("random" in note for note in row.notes):
        row.failed.append(f"nobody is told that {', '.join(row.chance)} follow chance")
    return row


def rows(
    specimens: Sequence[Specimen], grid: Grid, jobs: int, limit: float, device: str
) -> Iterator[Row]:
    """Drive specimens, each in a process of its own, some at once; yield them as they end.

    Args:
        specimens: Which.
        grid: What to try.
        jobs: How many at once.
        limit: Seconds after which a specimen counts as hung.
        device: What the models run on.
    """
    import_compiler()  # Two seconds that each fork would take.
    fork = multiprocessing.get_context("fork")
    waiting = list(specimens)
    running: dict[Connection, tuple[Specimen, multiprocessing.Process, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            specimen = waiting.pop(0)
            mine, theirs = fork.Pipe(duplex=False)
            process = fork.Process(
                target=_child, args=(specimen, grid, theirs, device), daemon=True
            )
            process.start()
            theirs.close()
            running[mine] = specimen, process, time.monotonic()
        wait(list(running), timeout=1)
        for pipe, (specimen, process, begun) in list(running.items()):
            if not pipe.poll() and time.monotonic() - begun < limit:
                continue
            yield _ended(pipe, specimen, process, limit)
            del running[pipe]


def _ended(
    pipe: Connection, specimen: Specimen, process: multiprocessing.Process, limit: float
) -> Row:
    row = Row(specimen.name, specimen.awkward)
    if not pipe.poll():
        process.kill()
        row.failed.append(f"it hung: {limit:.0f} s")
    else:
        try:
            row = Row(**json.loads(pipe.recv()))
        except EOFError:
            process.join()
            row.failed.append(f"it ended the process with exit code {process.exitcode}")
    process.join()
    pipe.close()
    return row


class _ForkedHelper(apart._Helper):
    """A helper that runs compiled programs in its children, forked instead of started.

    A process started for each specimen that has recurrent layers would import torch each time.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._timer = None
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = _Fork(partial(_run_helper, theirs, self._socket))
        theirs.close()


class _Fork:
    """A forked process, with the part of Popen's interface that helpers use."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.pid = os.fork()
        if not self.pid:
            try:
                run()
            finally:
                os._exit(1)
        self._ended = False

    def poll(self) -> int | None:
        self._ended = self._ended or os.waitpid(self.pid, os.WNOHANG)[0] != 0
        return 0 if self._ended else None

    def wait(self) -> None:
        if not self._ended:
            os.waitpid(self.pid, 0)
            self._ended = True


def _run_helper(server: socket.socket, others: socket.socket) -> None:
    """Run the code of ``apart``'s helper in this process, which has just been forked."""
    others.close()
    os.setpgid(0, 0)
    os.dup2(server.fileno(), 0)
    sys.argv[1:] = [str(apart._SECONDS)]
    exec(apart._HELPER, {})  # noqa: S102 - the code is ours


def _child(specimen: Specimen, grid: Grid, pipe: Connection, device: str) -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    # While this process has one thread, so that it may be forked.
    apart._idle.append(_ForkedHelper())
    # Threads change places often, so that races show.
    sys.setswitchinterval(1e-4)
    begun = time.monotonic()
    allow_tf32(False)
    report = drive(specimen, grid, device)
    pipe.send(json.dumps(asdict(row_of(specimen, report, time.monotonic() - begun))))
    pipe.close()
    # Not the usual way out: a model's own threads must not be waited for.
    os._exit(0)


ORDER = ("HOOK", "FX", "CHILDREN", "LAYER_GETTER", "TORCHSCRIPT", "AUTO")

HEADER = """## The zoo

{specimens} small models that are awkward to serve, each served in {ways} ways, alone and to eight
callers at once: {way_names}. Every answer is held against a fresh instance of the model that runs
once, to its end, under cloning hooks. Eight requests each: values of unlike magnitudes, NaN,
infinity, ties, ids over the whole vocabulary, padding, batches of one to three items.
HOOK, FX, CHILDREN and LAYER_GETTER must be equal bit for bit; TORCHSCRIPT, AUTO and passes that
requests share within 1e-4 of the layer's largest magnitude (float32). `make test-zoo` writes this
section, and tests/zoo has the models.

{answers} answers were right, **{wrong} wrong**; {failed} cells failed with an error, {late} were
refused only by a request, and {unloadable} models were refused when they were loaded.

A cell is *layers of which every answer was right / layers that the catalogue refuses*. Layers are
modules' calls and members of what they return.

"""


def section(found: Sequence[Row], grid: Grid) -> str:
    """Return the section of docs/coverage.md."""
    total = {kind: sum(len(getattr(row, kind)) for row in found)
             for kind in ("wrong", "late", "failed")}  # fmt: skip
    head = HEADER.format(
        specimens=len(found),
        ways=len(grid.ways),
        way_names="; ".join(way.name for way in grid.ways),
        answers=f"{sum(row.answers for row in found):,}",
        unloadable=sum(bool(row.unloadable) for row in found),
        **total,
    )
    return head + table(found)


def table(found: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        f"| model | what is awkward | layers | {' | '.join(ORDER)} | wrong | remarks |",
        f"| --- | --- | --- |{' --- |' * (len(ORDER) + 2)}",
    ]
    for row in found:
        cells = [f"{row.right.get(e, 0)} / {row.refused.get(e, 0)}" for e in ORDER]
        if row.unloadable:
            cells = ["–"] * len(ORDER)
        cells = [row.specimen, row.awkward, str(row.layers), *cells, str(len(row.wrong))]
        lines.append(f"| {' | '.join(cells)} | {remarks(row)} |")
    return "\n".join(lines) + "\n"


def remarks(row: Row) -> str:
    """Return what a table says of a row in words."""
    said = []
    if row.unloadable:
        said.append(f"refused: {row.unloadable}")
    if row.chance:
        said.append(f"{', '.join(row.chance)} follow chance, as the catalogue says")
    said += [note for note in row.notes if "may depend on earlier requests" in note]
    for kind in ("failed", "late"):
        if lines := getattr(row, kind):
            said.append(f"{len(lines)} {kind}, such as {lines[0][:160]}")
    return "; ".join(said).replace("|", "\\|").replace("\n", " ")


def say(row: Row) -> None:
    counts = f"{len(row.wrong)} wrong, {len(row.late)} late, {len(row.failed)} failed"
    print(f"{row.specimen:24} {row.seconds:5.1f} s {row.layers:3} layers, {counts} "
          f"{row.unloadable} {row.chance or ''}")  # fmt: skip
    for kind in ("wrong", "late", "failed"):
        for line in getattr(row, kind)[:3]:
            print(f"    {kind}: {line[:300]}")
    sys.stdout.flush()


def main() -> int:
    """Drive the specimens named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="specimens; all if none")
    parser.add_argument("--grid", choices=GRIDS, default="full")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="specimens at once")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one specimen")
    parser.add_argument("--device", default="cpu", help="what the models run on, such as cuda")
    parser.add_argument("--write", type=Path, help="the page whose section is to be written")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each")
    options = parser.parse_args()
    known = every_specimen()
    chosen = [known[name] for name in options.names] or list(known.values())
    found = []
    grid = GRIDS[options.grid]
    # What only the first model costs a process, such as setting up the compiler, is paid once.
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)  # A fork has none of the threads that its parent computed with.
    drive(known[FIRST], SHORT)
    gc.collect()
    gc.freeze()  # What is imported stays shared with the processes: their collectors skip it.
    for row in rows(chosen, grid, options.jobs, options.limit, options.device):
        found.append(row)
        print(json.dumps(asdict(row)), flush=True) if options.json else say(row)
        if options.write:  # Each time, so that a run that is cut keeps what it has.
            names = [specimen.name for specimen in chosen]
            inorder = sorted(found, key=lambda row: names.index(row.specimen))
            write_section(options.write, "zoo", section(inorder, grid))
    wrong = sum(len(row.wrong) + len(row.failed) for row in found)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
