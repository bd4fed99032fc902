"""A command that proves one model after another, and keeps what it has found.

Each model is proven in a process of its own, so that its memory is given back. The rows are kept as
JSON, so that a run that was cut goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from page import write_section

__all__ = ["Command", "ProofRow", "Subject"]


class Subject(Protocol):
    """A model under proof.

    Attributes:
        name: Its name.
        group: Where it is from.
    """

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> str: ...


class ProofRow(Protocol):
    """What became of one model.

    Attributes:
        model: Its name.
        group: Where it is from.
        wrong: What was wrong.
        error: Why nothing could be compared.
    """

    model: str
    group: str
    wrong: list[str]
    error: str


R = TypeVar("R", bound=ProofRow)
S = TypeVar("S", bound=Subject)


@dataclass(frozen=True)
class Command(Generic[R, S]):
    """A proof of many models, as a command.

    Attributes:
        name: The name of its section of docs/coverage.md.
        about: What it does, for ``--help``.
        groups: Makes the models of each group.
        row: Makes a row of its fields; ``model`` and ``group`` are the first two.
        prove: Proves a model on a device.
        section: Writes the section from the rows and the number of models of each group.
        words: Puts a row into words.
    """

    name: str
    about: str
    groups: Mapping[str, Callable[[], list[S]]]
    row: Callable[..., R]
    prove: Callable[[S, str], R]
    section: Callable[[Sequence[R], Mapping[str, int]], str]
    words: Callable[[R], str]

    def run(self) -> int:
        """Prove the models named on the command line, or all of them, and write the section.

        Returns:
            The exit status: 1 if something is wrong or was not compared.
        """
        options = self._options()
        rows = self._kept(options.rows)
        # What failed or was wrong is tried again; until then its row stays, so that it is seen.
        done = {(row.group, row.model) for row in rows if not row.error and not row.wrong}
        subjects = {
            group: make() for group, make in self.groups.items() if options.group in (None, group)
        }
        totals = {group: len(found) for group, found in subjects.items()}
        wanted = [
            subject
            for found in subjects.values()
            for subject in found
            if (
                subject.name in options.models
                if options.models
                else (subject.group, subject.name) not in done
            )
        ]
        for row in self._proven(wanted, options.device, options.jobs):
            rows = [each for each in rows if (each.group, each.model) != (row.group, row.model)]
            rows.append(row)
            print(self.words(row), flush=True)
            # Each time, so that a run that is cut keeps what it has.
            self._keep(rows, options.rows)
            self._write(rows, totals, options.write)
        self._write(rows, totals, options.write)
        bad = sum(len(row.wrong) + bool(row.error) for row in rows)
        print(f"{len(rows)} models, {bad} wrong or not compared")
        return 1 if bad else 0

    def _options(self) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=self.about)
        parser.add_argument("models", nargs="*", help="models to prove again; all new ones if none")
        parser.add_argument("--group", choices=list(self.groups), help="only models of this group")
        parser.add_argument("--device", default="cpu", help="what the models run on, such as cuda")
        parser.add_argument("--jobs", type=int, default=1, help="models at once")
        parser.add_argument("--rows", type=Path, help="a JSON file; models in it are left out")
        parser.add_argument("--write", type=Path, help="the Markdown file to write")
        return parser.parse_args()

    def _kept(self, file: Path | None) -> list[R]:
        """Return the rows of earlier runs."""
        if file is None or not file.exists():
            return []
        return [self.row(**each) for each in json.loads(file.read_text("utf-8"))]

    def _keep(self, rows: Sequence[R], file: Path | None) -> None:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            given: list[Any] = list(rows)
            file.write_text(json.dumps([asdict(each) for each in given], indent=0) + "\n", "utf-8")

    def _write(self, rows: Sequence[R], totals: Mapping[str, int], page: Path | None) -> None:
        if page is not None:
            write_section(page, self.name, self.section(rows, totals))

    def _proven(self, subjects: Sequence[S], device: str, jobs: int) -> Iterator[R]:
        """Prove models, some at once; yield their rows as they come."""
        with ThreadPoolExecutor(jobs) as pool:
            for proof in as_completed(pool.submit(self._apart, each, device) for each in subjects):
                yield proof.result()

    def _apart(self, subject: S, device: str) -> R:
        """Prove a model in a process of its own."""
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
            try:
                return pool.submit(self._quietly, subject.group, subject.name, device).result()
            except BrokenProcessPool:
                return self.row(subject.name, subject.group, error="its process ended")

    def _quietly(self, group: str, name: str, device: str) -> R:
        logging.disable(logging.CRITICAL)
        torch.set_num_threads(1)
        subject = next(each for each in self.groups[group]() if each.name == name)
        try:
            return self.prove(subject, device)
        except Exception as error:  # noqa: BLE001 - one model must not end the run
            return self.row(name, group, error=f"{type(error).__name__}: {str(error)[:300]}")
