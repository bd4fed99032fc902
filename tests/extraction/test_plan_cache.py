"""Compiled plans survive a restart, and a stored one that doesn't fit is never used."""

from __future__ import annotations

import json
import os
import resource
import threading
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from batches import batch_for, key_for, key_of_shape
from disks import small_disk
from layertap.errors import ConfigError, ExtractorUnsupportedError
from layertap.extraction import CapturePoint, PlanBuilder, PointKind, Taps, measure
from layertap.extraction.kinds import torchscript
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.plan_cache import PlanCache, plan_digest
from layertap.extraction.proof import collect
from layertap.extraction.verify import COMPILED_TOLERANCE, difference
from layertap.models import LoadedModel
from layertap.selection import Extractor
from oracle import outputs_of
from tinynets import ITEM

LAYER1 = [CapturePoint(PointKind.MODULE, "layer1")]
LAYER2 = [CapturePoint(PointKind.MODULE, "layer2")]
PLENTY = 1 << 30


class Traces:
    """Counts how often a program is traced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        trace = torchscript.trace_taps

        def counted(*args: object, **options: object) -> torch.jit.ScriptModule:
            self.count += 1
            return trace(*args, **options)

        monkeypatch.setattr(torchscript, "trace_taps", counted)


@pytest.fixture
def traces(monkeypatch) -> Traces:
    """How often a program was traced since the test began."""
    return Traces(monkeypatch)


def build(model: LoadedModel, folder: Path, points=LAYER1, most: int = PLENTY, keep=True):
    """Build like a process that has just started."""
    cache = PlanCache(folder, most)
    builder = PlanBuilder(model, Taps(model.module), measure(model), cache)
    return builder.build(
        Extractor.TORCHSCRIPT, PassSpec(tuple(points)), key_for(model, ITEM), keep=keep
    )


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def check(model: LoadedModel, built, path: str = "layer1") -> None:
    x = torch.rand(3, *ITEM)
    (value,) = collect(built.built, LAYER1, batch_for(built, x))
    reference = outputs_of(model.module, x, path)[0]
    assert difference(value, reference) <= COMPILED_TOLERANCE[torch.float32]


def test_a_stored_plan_is_not_traced_again(load_net, tmp_path, traces) -> None:
    """The second start loads what the first one stored, and its values are right."""
    check(load_net("chain"), build(load_net("chain"), tmp_path))
    assert (traces.count, len(files(tmp_path))) == (1, 1)
    model = load_net("chain")
    check(model, build(model, tmp_path))
    assert (traces.count, len(files(tmp_path))) == (1, 1)


def test_only_plans_that_are_to_be_kept_are_stored(load_net, tmp_path) -> None:
    """Plans for other requests don't fill the disk."""
    build(load_net("chain"), tmp_path, keep=False)
    assert files(tmp_path) == []


def test_other_weights_are_another_plan(load_net, tmp_path, traces) -> None:
    """After a change of one number in one weight, the stored program is not used."""
    build(load_net("chain"), tmp_path)
    model = load_net("chain")
    model.module.conv1.weight[0, 0, 0, 0] += 1
    check(model, build(model, tmp_path))
    assert (traces.count, len(files(tmp_path))) == (2, 2)


def test_a_stored_plan_that_no_longer_fits_is_made_anew(load_net, tmp_path, traces, caplog) -> None:
    """A file with the wrong program is detected by the proof, and replaced."""
    build(load_net("chain"), tmp_path)
    (right,) = files(tmp_path)
    other = load_net("chain")
    other.module.conv1.weight.mul_(2)
    build(other, tmp_path)
    (wrong,) = (file for file in files(tmp_path) if file != right)
    wrong.replace(right)
    model = load_net("chain")
    check(model, build(model, tmp_path))
    assert traces.count == 3
    assert "no longer fits" in caplog.text
    check(model, build(model, tmp_path))
    assert traces.count == 3


@pytest.mark.parametrize("damage", [b"", b"no program", None])
def test_a_damaged_file_is_made_anew(load_net, tmp_path, traces, damage) -> None:
    """An empty, foreign or truncated file only costs the time of tracing."""
    build(load_net("chain"), tmp_path)
    (file,) = files(tmp_path)
    file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    model = load_net("chain")
    check(model, build(model, tmp_path))
    assert traces.count == 2
    assert len(files(tmp_path)) == 1


def stored_program(load_net, folder: Path, name: str, path: str) -> Path:
    """Store the program of one layer under a name; return its file."""
    model = load_net("chain")
    program = torchscript.trace_taps(
        model,
        Taps(model.module),
        [CapturePoint(PointKind.MODULE, path)],
        batch_for(model, torch.rand(2, *ITEM)),
    )
    with PlanCache(folder, PLENTY).file(name).storing(torchscript.KIND, program):
        pass
    return folder / f"{name}.plan.pt"


def test_a_file_that_is_replaced_while_it_is_loaded(load_net, tmp_path, monkeypatch) -> None:
    """The program and the digest in its proof are of one file: the new one."""
    path = stored_program(load_net, tmp_path, "mine", "layer1")
    other = stored_program(load_net, tmp_path, "other", "layer2")
    load, loads = torchscript.TorchScriptKind.load, []

    def replaced(kind, path: Path, model: LoadedModel) -> torch.jit.ScriptModule:
        program = load(kind, path, model)
        if not loads:
            other.replace(path)
        loads.append(path)
        return program

    monkeypatch.setattr(torchscript.TorchScriptKind, "load", replaced)
    file = PlanCache(tmp_path, PLENTY).file("mine")
    model = load_net("chain")
    program = file.load(torchscript.KIND, model)
    x = torch.rand(2, *ITEM)
    reference = outputs_of(model.module, x, "layer2")[0]
    assert difference(program(x)[0], reference) <= COMPILED_TOLERANCE[torch.float32]
    assert loads == [path, path]
    file.keep_proof("facts", [1])
    kept = json.loads((tmp_path / "mine.proof").read_text())
    assert kept["program"] == blake3(path.read_bytes()).hexdigest()


def test_a_program_is_digested_where_no_thread_can_be_started(
    load_net, tmp_path, monkeypatch
) -> None:
    """Then the thread that loads it does it, and the proof fits."""
    stored_program(load_net, tmp_path, "mine", "layer1")
    file = PlanCache(tmp_path, PLENTY).file("mine")
    file.load(torchscript.KIND, load_net("chain"))
    file.keep_proof("facts", [1, 2])

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    again = PlanCache(tmp_path, PLENTY).file("mine")
    again.load(torchscript.KIND, load_net("chain"))
    assert again.proven_sizes("facts") == [1, 2]
    assert again.proven_sizes("other facts") == []


def test_a_refused_plan_is_not_stored(load_net, tmp_path) -> None:
    """Only proven plans are stored; not even a part of another file remains."""
    points = [CapturePoint(PointKind.MODULE, "tail")]
    with pytest.raises(ExtractorUnsupportedError):
        build(load_net("bakes_batch"), tmp_path, points)
    assert files(tmp_path) == []


def test_the_longest_unused_plans_go(load_net, tmp_path) -> None:
    """The folder stays within its limit; the most recently used plans stay."""
    build(load_net("chain"), tmp_path, LAYER1)
    (first,) = files(tmp_path)
    build(load_net("chain"), tmp_path, LAYER2)
    (second,) = (file for file in files(tmp_path) if file != first)
    os.utime(second, (1, 1))
    build(load_net("chain"), tmp_path, LAYER1)  # Used, and so the younger one.
    most = first.stat().st_size + second.stat().st_size
    build(load_net("chain"), tmp_path, [*LAYER1, *LAYER2], most)
    assert second not in files(tmp_path)
    assert sum(file.stat().st_size for file in files(tmp_path)) <= most


def test_a_folder_that_others_can_write_is_refused(tmp_path) -> None:
    """The server runs programs from it, so nobody else may put one there."""
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="other users can write"):
        PlanCache(tmp_path, PLENTY)


def test_a_folder_that_can_not_be_made_is_told(tmp_path) -> None:
    """A file in its place is named in the error."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="file"):
        PlanCache(tmp_path / "file" / "plans", PLENTY)


def test_a_full_disk_costs_the_stored_plan_only(load_net, tmp_path, caplog) -> None:
    """The plan is served, the log names the reason, and no partial file is left."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        disk.fill()
        model = load_net("chain")
        check(model, build(model, disk.folder))
        assert disk.names() == []
        assert "plan not stored: No space left on device" in caplog.text
        (disk.folder / "filler").unlink()
        check(model, build(model, disk.folder))
        assert len(disk.names()) == 1  # Room that comes later is used.


def test_a_write_that_fails_midway_leaves_nothing(load_net, tmp_path, caplog) -> None:
    """A file system that accepts only the first bytes of a program counts as full."""
    model = load_net("chain")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        built = build(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check(model, built)
    assert files(tmp_path) == []
    assert "plan not stored: File too large" in caplog.text


def test_a_read_only_disk_is_read(load_net, tmp_path, traces, caplog) -> None:
    """Stored plans are read, damaged and new ones are built, and nothing fails."""
    with small_disk(tmp_path / "disk", "4m") as disk:
        model = load_net("chain")
        build(model, disk.folder)
        (disk.folder / "damaged").mkdir(mode=0o700)
        build(model, disk.folder / "damaged")
        (damaged,) = files(disk.folder / "damaged")
        damaged.write_bytes(b"no program")
        disk.forbid_writing()
        assert traces.count == 2
        check(model, build(model, disk.folder))
        assert traces.count == 2
        check(model, build(model, disk.folder / "damaged"))
        check(model, build(model, disk.folder / "new"))
        assert traces.count == 4
    assert caplog.text.count("plan not stored: Read-only file system") == 2
    assert "can't be removed: Read-only file system" in caplog.text
    assert "new: plans are not stored: Read-only file system" in caplog.text


def test_a_folder_that_was_removed_is_made_again(load_net, tmp_path) -> None:
    """If the folder is removed while the server runs, the next plan is stored as before."""
    model = load_net("chain")
    cache = PlanCache(tmp_path / "plans", PLENTY)
    (tmp_path / "plans").rmdir()
    builder = PlanBuilder(model, Taps(model.module), measure(model), cache)
    check(
        model,
        builder.build(
            Extractor.TORCHSCRIPT, PassSpec(tuple(LAYER1)), key_for(model, ITEM), keep=True
        ),
    )
    assert len(files(tmp_path / "plans")) == 1


def test_what_a_killed_process_left_is_removed(tmp_path) -> None:
    """Parts of files that nobody has written to for hours go at the next start; younger ones stay.

    Another process may be writing those.
    """
    (tmp_path / "old.part").write_bytes(b"part")
    (tmp_path / "young.part").write_bytes(b"part")
    tmp_path.chmod(0o700)
    os.utime(tmp_path / "old.part", (1, 1))
    PlanCache(tmp_path, PLENTY)
    assert [path.name for path in files(tmp_path)] == ["young.part"]


def test_programs_of_different_kinds_are_different_files() -> None:
    """Two compilers of one layer set and batch key never read each other's file."""

    class AnotherKind(torchscript.TorchScriptKind):
        name = "ANOTHER"

    def name_of(kind: torchscript.TorchScriptKind, points: list[CapturePoint] = LAYER1) -> str:
        return plan_digest("model", kind, PassSpec(tuple(points)), key_of_shape(ITEM))

    assert name_of(torchscript.KIND) == name_of(torchscript.TorchScriptKind())
    assert name_of(torchscript.KIND) != name_of(AnotherKind())
    assert name_of(torchscript.KIND) != name_of(torchscript.KIND, LAYER2)
