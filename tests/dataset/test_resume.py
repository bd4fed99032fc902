"""An interrupted run continues, and its output has the bytes of one that was never interrupted."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import lance
import numpy as np
import pytest
import torch

from layertap import Capture, LayerSelection, Method, Sweep, load
from layertap.dataset import Outcome, extract, pipeline
from layertap.dataset.manifest import Workplace
from layertap.errors import InvalidInputError
from layertap.local import LocalModel

FORMATS = ["npz", "npy", "safetensors", "parquet", "lance", "zarr", "h5"]
KILLS = int(os.environ.get("LAYERTAP_KILLS", "2"))
"""How often a run is killed before it may end; more of them take a few seconds each."""
ITEMS, SHARD = 96, 8
SHARDS = ITEMS // SHARD
# Its processes start as copies of one that has imported PyTorch, which takes seconds.
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["layertap.local", "layertap.dataset"])


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An .npy file of random items."""
    path = tmp_path_factory.mktemp("items") / "items.npy"
    np.save(path, np.random.default_rng(0).random((ITEMS, 3, 16, 16), np.float32))
    return str(path)


@dataclass
class Case:
    """What a test extracts, and where to."""

    model: LocalModel
    items: str
    folder: Path

    def run(self, output: Path, **options: object) -> Outcome:
        """Extract two layers of all items."""
        given = {"extractor": "hook", "batch_size": 4, "shard_items": SHARD, **options}
        layers = ["layer1", "avgpool:reduce=flatten=pooled"]
        return extract(self.model, [self.items], layers, output, **given)


@pytest.fixture
def case(model: LocalModel, items: str, tmp_path: Path) -> Case:
    return Case(model, items, tmp_path)


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a folder."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    versions = [name for name in found if "/_versions/" in name or "/_transactions/" in name]
    if not versions:
        return found
    # Lance gives each version a time and random names. Its rows and data files have none.
    for name in versions:
        del found[name]
    manifest = json.loads(found.pop("out.lance.manifest.json"))
    manifest["files"] = {n: each for n, each in manifest["files"].items() if n.startswith("data/")}
    table = lance.dataset(folder / "out.lance").to_table()
    return {
        **found,
        "manifest": json.dumps(manifest).encode(),
        "rows": repr(table.to_pydict()).encode(),
    }


def killed(items: str, output: Path, begun, seconds: float) -> None:
    """Run in a process of its own, until kill -9 so many seconds after the model is loaded."""
    process = FORKING.Process(target=in_process, args=(items, str(output), begun))
    process.start()
    assert begun.wait(60)
    begun.clear()
    time.sleep(seconds)
    process.kill()
    process.join()
    process.close()


def in_process(items: str, output: str, begun) -> None:
    with load("tinynets:residual", item_shape=[3, 16, 16], threads=1) as model:
        begun.set()
        Case(model, items, Path()).run(Path(output))


def test_what_a_crash_left_half_written_is_removed(case: Case) -> None:
    """Our own temporary files and those that safetensors makes; the shards stay."""
    folder = case.folder / "out.safetensors"
    folder.mkdir()
    for name in ("part-00000.safetensors.tmp", ".tmpcUfogl", "part-00001.safetensors"):
        (folder / name).touch()
    Workplace(folder, sharded=True).begin_shards()
    assert [path.name for path in folder.iterdir()] == ["part-00001.safetensors"]


@pytest.mark.long
@pytest.mark.parametrize("suffix", FORMATS)
def test_killed_runs_continue(case: Case, suffix: str) -> None:
    """After kill -9 at random moments, the files have the same bytes as without it.

    No shard that was on the disk is computed again.
    """
    whole, broken = case.folder / "whole", case.folder / "broken"
    whole.mkdir()
    broken.mkdir()
    started = time.perf_counter()
    case.run(whole / f"out.{suffix}")
    seconds = time.perf_counter() - started
    output, begun = broken / f"out.{suffix}", FORKING.Event()
    for _ in range(KILLS):
        # So that some of the work is still to be done when the last one comes.
        killed(case.items, output, begun, random.random() * seconds * 2 / KILLS)
    place = Workplace(output)
    on_disk = SHARDS if place.complete() else len(place.records())
    outcome = case.run(output)
    assert outcome.rows == ITEMS
    assert outcome.shards_before == on_disk
    assert content(broken) == content(whole)


class Crash(BaseException):
    """What no code handles, as nothing handles a crash."""


@pytest.fixture
def crashing(monkeypatch: pytest.MonkeyPatch):
    """Return a context in which the process does no more to the disk after a number of calls."""

    @contextmanager
    def until(calls: int) -> Iterator[None]:
        left = calls

        def broken(real):
            def call(*args: object, **kwargs: object):
                nonlocal left
                left -= 1
                if left < 0:
                    raise Crash
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch, suppress(Crash):
            for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
                patch.setattr(os, name, broken(getattr(os, name)))
            yield

    return until


@pytest.mark.parametrize("suffix", [pytest.param("npz", marks=pytest.mark.long), "parquet"])
@pytest.mark.parametrize("calls", range(0, 60, 4))
def test_a_crash_at_every_step_of_writing(case: Case, suffix: str, calls: int, crashing) -> None:
    """Whichever call that syncs, renames or removes is the last, the next run completes it."""
    whole, broken = case.folder / "whole", case.folder / "broken"
    whole.mkdir()
    broken.mkdir()
    case.run(whole / f"out.{suffix}", shard_items=32)
    with crashing(calls):
        case.run(broken / f"out.{suffix}", shard_items=32)
    case.run(broken / f"out.{suffix}", shard_items=32)
    assert content(broken) == content(whole)


def stopped(case: Case, output: Path, **options: object) -> None:
    """Run until a shard is written, then stop as Ctrl-C does."""

    def report(_: object) -> None:
        if Workplace(output).records():
            raise KeyboardInterrupt

    class Slow(pipeline.Pipeline):
        def _place(self, *args: object) -> None:
            time.sleep(0.05)
            super()._place(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layertap.dataset.run.Pipeline", Slow)
        with pytest.raises(KeyboardInterrupt):
            case.run(output, report=report, **options)


def test_a_torn_line_of_the_journal_is_written_again(case: Case) -> None:
    """A line that a crash cut off counts as no line, and does not spoil the next one."""
    place = Workplace(case.folder / "out.npz")
    case.run(case.folder / "whole.npz")
    stopped(case, place.output)
    with (place.folder / "shards.jsonl").open("ab") as journal:
        journal.write(b'{"number": 7, "fi')
    assert case.run(place.output).rows == ITEMS
    assert place.output.read_bytes() == (case.folder / "whole.npz").read_bytes()


def test_ctrl_c_leaves_whole_shards(case: Case) -> None:
    """After an interruption there are whole shards and no temporary file; the run continues."""
    output = case.folder / "out.parquet"
    stopped(case, output)
    written = Workplace(output).records()
    assert 0 < len(written) < SHARDS
    files = sorted(path.name for path in output.iterdir())
    assert files == sorted(record.file for record in written.values())
    outcome = case.run(output)
    assert outcome.shards_before == len(written)
    assert outcome.shards_before + outcome.shards_written == SHARDS


def test_a_complete_output_is_not_made_again(case: Case) -> None:
    """The same call again does nothing, and returns the same outcome."""
    output = case.folder / "out.npz"
    first = case.run(output)
    state = output.stat()
    again = case.run(output)
    assert output.stat().st_mtime_ns == state.st_mtime_ns
    assert (again.rows, again.outputs, again.failures) == (first.rows, first.outputs, ())
    assert (first.shards_written, again.shards_written) == (SHARDS, 0)


def test_what_interventions_changed_is_added_up_over_all_runs(case: Case) -> None:
    """The counts are those of single requests, also if a run was interrupted, or does nothing."""
    changes = ["layer1:channel=0..2:zero", "layer1:channel=7:scale=1"]
    output = case.folder / "out.npz"
    stopped(case, output, interventions=changes)
    assert 0 < len(Workplace(output).records()) < SHARDS
    outcomes = [case.run(output, interventions=changes) for _ in range(2)]
    expected = np.zeros((2, 2), np.int64)
    for item in np.load(case.items):
        found = case.model.extract(item[None], "layer1", interventions=changes)
        reports = [found[f"interventions.{name}"] for name in ("elements", "changed")]
        expected += np.stack(reports, 1)
    assert expected[0, 0] > expected[0, 1] > 0
    for outcome in outcomes:
        assert [(each.elements, each.changed) for each in outcome.changed] == [
            tuple(row) for row in expected.tolist()
        ]


@pytest.mark.parametrize("complete", [True, False])
def test_a_change_is_refused_in_words(case: Case, complete: bool) -> None:
    """An output is neither continued nor replaced by a call that would give other values."""
    output = case.folder / "out.npz"
    if complete:
        case.run(output)
    else:
        stopped(case, output)
    with pytest.raises(InvalidInputError, match=r"options.batch_size: 4 before, 8 now"):
        case.run(output, batch_size=8)
    # Without a cache, the fingerprint is taken at its first use, so of the changed weights.
    with load("tinynets:residual", item_shape=[3, 16, 16], threads=1, plan_cache="off") as other:
        with torch.no_grad():
            other.host.model.module.conv1.weight[0, 0, 0, 0] += 1
        with pytest.raises(InvalidInputError, match=r"model.fingerprint: .* before, .* now"):
            replace(case, model=other).run(output)
    np.save(case.folder / "items.npy", np.load(case.items))
    with pytest.raises(InvalidInputError, match=r"inputs.first: .*items.npy:0 before"):
        replace(case, items=str(case.folder / "items.npy")).run(output)
    assert case.run(output).rows == ITEMS
    replaced = case.run(output, batch_size=8, overwrite=True)
    assert replaced.shards_before == 0
    assert json.loads(Workplace(output).manifest.read_text())["facts"]["options"]["batch_size"] == 8


def test_overwrite_continues_an_interrupted_run(case: Case) -> None:
    """After a crash, the same command with ``--overwrite`` continues instead of starting over."""
    output = case.folder / "out.parquet"
    output.mkdir()
    (output / "old").write_text("old")
    with pytest.raises(InvalidInputError, match="no manifest; --overwrite replaces it"):
        case.run(output)
    stopped(case, output, overwrite=True)
    assert not (output / "old").exists()
    assert case.run(output, overwrite=True).shards_before > 0


def test_a_changed_item_is_refused(case: Case) -> None:
    """A file of the same size and name that was written again counts as a change."""
    copy = case.folder / "items.npy"
    copy.write_bytes(Path(case.items).read_bytes())
    case = replace(case, items=str(copy))
    case.run(case.folder / "out.npz")
    os.utime(copy, ns=(1, 1))
    with pytest.raises(InvalidInputError, match="names, sizes and times of change"):
        case.run(case.folder / "out.npz")


def test_a_damaged_part_is_found(case: Case) -> None:
    """Parts are held against their checksums before they are joined."""
    output = case.folder / "out.npz"
    stopped(case, output)
    part = min(Workplace(output).folder.glob("part-*.npz"))
    raw = bytearray(part.read_bytes())
    raw[len(raw) // 2] ^= 1
    part.write_bytes(raw)
    with pytest.raises(InvalidInputError, match=r"part-0000.\.npz is damaged; remove it"):
        case.run(output)
    part.unlink()
    assert case.run(output).rows == ITEMS


def test_two_runs_at_once_are_refused(case: Case) -> None:
    """A second process does not touch an output that another one writes."""
    place = Workplace(case.folder / "out.npz")
    with place.locked(), pytest.raises(InvalidInputError, match="another process is writing it"):
        case.run(place.output)
    assert list(case.folder.iterdir()) == []
    assert case.run(place.output).rows == ITEMS


def test_methods_of_one_layer_and_tensor_baselines_are_told_apart(case: Case) -> None:
    """Another method, form of a map or baseline is a change, also beside others of the layer."""
    output = case.folder / "out.npz"

    def run(base: float | np.ndarray, form: str = "grid") -> Outcome:
        swept = LayerSelection(
            "layer1",
            Capture.GRADIENT,
            method=Method.INTEGRATED_GRADIENTS,
            sweep=Sweep(steps=2, baseline=base),
        )
        cam = LayerSelection.parse(f"layer1:grad_cam:map={form}")
        return extract(
            case.model, [case.items], [swept, cam, "layer1:gradient"], output,
            objective="fc[0]", batch_size=8,
        )  # fmt: skip

    base = np.zeros((8, 8, 8), np.float32)
    assert run(base).rows == ITEMS
    assert run(base.copy()).shards_written == 0
    with pytest.raises(InvalidInputError, match=r"layer1:gradient:grad_cam.map_form: grid"):
        run(base, "resized")
    with pytest.raises(InvalidInputError, match=r"integrated_gradients.sweep.baseline.sha256"):
        run(base + 1)
    with pytest.raises(InvalidInputError, match=r"integrated_gradients.sweep.baseline"):
        run(0.0)
