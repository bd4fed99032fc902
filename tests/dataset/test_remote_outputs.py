"""Outputs in object stores: what is there after a crash, and after the run that continues.

The store of these tests is a folder in which an object appears by a rename, so that processes can
share it. ``check_s3.py`` does the same with an S3 server.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner
from fsspec.implementations.local import LocalFileSystem

from layertap import load
from layertap.cli.main import main
from layertap.dataset import Outcome, extract, remote_workplace
from layertap.dataset.remote_workplace import RemoteWorkplace
from layertap.errors import InvalidInputError, UnavailableError
from layertap.local import LocalModel

ITEMS, SHARD = 48, 8
SHARDS = ITEMS // SHARD
FORMATS = ["parquet", "safetensors"]
FORKING = multiprocessing.get_context("forkserver")
LAYERS = ["layer1", "avgpool:reduce=flatten=pooled"]


class FolderStore(LocalFileSystem):
    """A folder as an object store, for the addresses ``oss://PATH``.

    Attributes:
        failing: How many further calls fail as if the store could not be reached.
    """

    protocol = ("oss",)
    cachable = False
    failing = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("oss:/"))

    def unstrip_protocol(self, name: str) -> str:
        """Return the address of a path."""
        return f"oss:/{name}"

    def _reach(self) -> None:
        if FolderStore.failing:
            FolderStore.failing -= 1
            raise ConnectionError("the store is gone")

    def put_file(self, lpath: str, rpath: str, **options: object) -> None:
        """Send a file, which appears whole."""
        del options
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def pipe_file(self, path: str, value: bytes, **options: object) -> None:
        """Send an object, which appears whole."""
        del options
        self._reach()
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent.parent / f".{target.name}.{os.getpid()}"
        temporary.write_bytes(value)
        temporary.rename(target)

    def find(self, path: str, **options: Any) -> Any:
        """List objects; a folder that has none is not there."""
        self._reach()
        return super().find(path, **options)


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store without pauses between tries."""
    fsspec.register_implementation("oss", FolderStore, clobber=True)
    monkeypatch.setattr(remote_workplace, "_PAUSE", 0.01)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An .npy file of random items."""
    path = tmp_path_factory.mktemp("items") / "items.npy"
    np.save(path, np.random.default_rng(0).random((ITEMS, 3, 16, 16), np.float32))
    return str(path)


def run(model: LocalModel, items: str, output: str, **options: Any) -> Outcome:
    given = {"extractor": "hook", "batch_size": 4, "shard_items": SHARD, **options}
    return extract(model, [items], LAYERS, output, **given)


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every object, except those on their way."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def same(store: Path, disk: Path) -> bool:
    """Return whether a store has what the disk has."""
    return content(store) == content(disk)


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_object_store_gets_what_the_disk_gets(
    model: LocalModel, items: str, tmp_path: Path, suffix: str
) -> None:
    """Shards, manifest and nothing else; and the same command then does nothing."""
    store, disk = tmp_path / "store", tmp_path / "disk"
    disk.mkdir()
    outcome = run(model, items, f"oss://{store}/out.{suffix}")
    run(model, items, str(disk / f"out.{suffix}"))
    assert outcome.rows == ITEMS
    assert outcome.output == f"oss://{store}/out.{suffix}"
    assert same(store, disk)
    again = run(model, items, f"oss://{store}/out.{suffix}/")
    assert (again.shards_before, again.shards_written) == (SHARDS, 0)


def in_process(items: str, output: str, begun: Any) -> None:
    fsspec.register_implementation("oss", FolderStore, clobber=True)
    with load("tinynets:residual", item_shape=[3, 16, 16], threads=1) as model:
        begun.set()
        run(model, items, output)


@pytest.mark.parametrize(
    "suffix", [FORMATS[0], *(pytest.param(each, marks=pytest.mark.long) for each in FORMATS[1:])]
)
def test_killed_runs_continue(model: LocalModel, items: str, tmp_path: Path, suffix: str) -> None:
    """After kill -9 at random moments, the objects have the same bytes as without it."""
    store, disk = tmp_path / "store", tmp_path / "disk"
    disk.mkdir()
    started = time.perf_counter()
    run(model, items, str(disk / f"out.{suffix}"))
    seconds = time.perf_counter() - started
    output, begun = f"oss://{store}/out.{suffix}", FORKING.Event()
    for _ in range(2):
        process = FORKING.Process(target=in_process, args=(items, output, begun))
        process.start()
        assert begun.wait(60)
        begun.clear()
        while RemoteWorkplace(output).started() is None and process.is_alive():
            if RemoteWorkplace(output).complete():
                break
            time.sleep(0.01)
        time.sleep(random.random() * seconds)
        process.kill()
        process.join()
        process.close()
    place = RemoteWorkplace(output)
    there = SHARDS if place.complete() else len(place.records())
    outcome = run(model, items, output)
    assert outcome.shards_before == there
    assert same(store, disk)


class Crash(BaseException):
    """What no code handles, as nothing handles a crash."""


def test_a_crash_before_every_step(
    model: LocalModel, items: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a run ends, the next one has the same objects, and repeats at most one shard."""
    disk = tmp_path / "disk"
    disk.mkdir()
    run(model, items, str(disk / "out.parquet"))
    pipe, rm = FolderStore.pipe_file, FolderStore.rm
    for steps in range(2 * SHARDS + 4):
        store, left = tmp_path / f"store{steps}", steps
        sent: list[str] = []

        def step(real: Any, *args: Any, sent: list[str] = sent, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash
            sent.append(args[1])
            return real(*args, **options)

        with monkeypatch.context() as patch, suppress(Crash):
            patch.setattr(FolderStore, "pipe_file", lambda *a, **o: step(pipe, *a, **o))
            patch.setattr(FolderStore, "rm", lambda *a, **o: step(rm, *a, **o))
            run(model, items, f"oss://{store}/out.parquet")
        shards = sum("/out.parquet/" in str(each) for each in sent)
        outcome = run(model, items, f"oss://{store}/out.parquet")
        assert shards - outcome.shards_before in (0, 1)
        assert same(store, disk), steps


def test_what_differs_is_refused(model: LocalModel, items: str, tmp_path: Path) -> None:
    """Another option, or an output without a manifest, needs overwrite."""
    output = f"oss://{tmp_path}/store/out.parquet"
    run(model, items, output)
    with pytest.raises(InvalidInputError, match="batch_size: 4 before, 8 now"):
        run(model, items, output, batch_size=8)
    run(model, items, output, batch_size=8, shard_items=16, overwrite=True)
    assert len(list((tmp_path / "store" / "out.parquet").iterdir())) == 3
    (tmp_path / "store" / "out.parquet.manifest.json").unlink()
    with pytest.raises(InvalidInputError, match="which has no manifest"):
        run(model, items, output)


def test_a_store_that_is_gone_for_a_while(model: LocalModel, items: str, tmp_path: Path) -> None:
    """A few failures are waited for; a store that stays away ends the run, which continues."""
    output = f"oss://{tmp_path}/store/out.parquet"
    FolderStore.failing = 3
    assert run(model, items, output).rows == ITEMS
    FolderStore.failing = 1000
    try:
        with pytest.raises(UnavailableError, match="the store is gone"):
            run(model, items, output)
    finally:
        FolderStore.failing = 0
    assert run(model, items, output).shards_written == 0


def test_items_that_failed_are_listed(model: LocalModel, tmp_path: Path) -> None:
    """The list is an object beside the output."""
    del model
    (tmp_path / "bad.jpg").write_bytes(b"no photo")
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "good.jpg")
    output = f"oss://{tmp_path}/store/out.parquet"
    done = CliRunner().invoke(
        main,
        ["extract", "tinynets:chain", str(tmp_path / "bad.jpg"), str(tmp_path / "good.jpg"),
         "-l", "layer1", "-o", output, "--on-error", "skip", "--item-shape", "3,16,16",
         "--device", "cpu"],
    )  # fmt: skip
    assert done.exit_code == 3, done.output
    [line] = (tmp_path / "store" / "out.parquet.failures.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == str(tmp_path / "bad.jpg")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("oss://x/out.npz", "npz is written as a whole .* expected safetensors, parquet"),
        ("https://example.org/out.parquet", r"got https://, expected .* s3"),
        ("nosuch://x/out.parquet", "got nosuch://"),
    ],
)
def test_outputs_that_are_refused(model: LocalModel, items: str, output: str, message: str) -> None:
    """Before anything is run."""
    with pytest.raises(InvalidInputError, match=message):
        run(model, items, output)


def test_file_addresses_are_paths(model: LocalModel, items: str, tmp_path: Path) -> None:
    """They take every format."""
    run(model, items, f"file://{tmp_path}/out.npz")
    with np.load(tmp_path / "out.npz") as stored:
        assert stored["pooled"].shape == (ITEMS, 16)


def test_fsspecs_own_store(model: LocalModel, items: str) -> None:
    """An output in memory is read back by fsspec."""
    memory = fsspec.filesystem("memory")
    run(model, items, "memory://outputs/out.safetensors")
    try:
        names = sorted(memory.find("/outputs"))
        assert names[0] == "/outputs/out.safetensors.manifest.json"
        assert len(names) == SHARDS + 1
    finally:
        memory.rm("/outputs", recursive=True)
