"""EXPORT gives the modules' values, without the GIL, and starts without a compiler.

A package takes long to compile, so nearly all of these tests share one.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import exportnets
from asking import ask, request_for
from exportnets import ITEM
from layertap import Extractor, LayerSelection
from layertap.engine import Call, Engine
from layertap.engine.contest import Contest, Entrant, Race
from layertap.engine.kept_races import KeptRaces
from layertap.errors import DeadlineExceededError, ExtractorUnsupportedError
from layertap.extraction import packager
from layertap.extraction.apart import ProgramEndedError
from layertap.extraction.kinds import torchscript
from layertap.extraction.kinds.export import ExportExtractor, ExportKind
from layertap.extraction.package import InputShape, LoadedPackage, PackageError
from layertap.extraction.passes import KeptState
from layertap.extraction.pause import Pause, run_to_end
from layertap.extraction.plan_cache import PlanCache
from layertap.extraction.verify import COMPILED_TOLERANCE, difference
from layertap.models import ModelSpec
from oracle import outputs_of
from quick import SLOW

PATIENCE = 300.0
LAYERS = ["bn", "bn_1", "split.0", "split.1", "mix:input", "mix"]

pytestmark = [
    pytest.mark.skipif(
        not shutil.which("g++"), reason="a package is compiled with g++, which is not here"
    ),
    # Compiling takes a minute alone, and more beside other work, as it has a low priority.
    pytest.mark.long,
    pytest.mark.timeout(900),
]


def pair(size: int, item: tuple[int, ...] = ITEM) -> dict[str, torch.Tensor]:
    return {"left": torch.randn(size, *item), "right": torch.randn(size, *item)}


def truths(x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the values of LAYERS, by plain PyTorch on a fresh net."""
    net = exportnets.hazards()
    seen: dict[str, list[torch.Tensor]] = {"bn": [], "split": [], "mix": [], "mix:input": []}

    def keep(name: str, value: object) -> None:
        values = value if isinstance(value, tuple) else (value,)
        seen[name] += [each.clone() for each in values]

    for name in ("bn", "split", "mix"):
        net.get_submodule(name).register_forward_hook(lambda *a, name=name: keep(name, a[-1]))
    net.mix.register_forward_pre_hook(lambda _, args: keep("mix:input", args))
    net(**{name: tensor.clone() for name, tensor in x.items()})
    return [*seen["bn"], *seen["split"], *seen["mix:input"], *seen["mix"]]


def loaded(folder: Path) -> Engine:
    """Return an engine that serves the net, like a process that has just started."""
    engine = Engine(plan_cache=PlanCache(folder, 1 << 30))
    engine.load(ModelSpec("exportnets:hazards", name="net", item_shape=ITEM))
    return engine


@dataclass(frozen=True)
class Compiled:
    """An engine that has compiled one package, where it is stored, and how it runs."""

    engine: Engine
    folder: Path
    file: Path
    extractor: ExportExtractor


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    folder = tmp_path_factory.mktemp("plans")
    with closing(loaded(folder)) as engine:
        ask(engine, "net", LAYERS, pair(2), Extractor.EXPORT)
        [plan] = [each for each in engine.host("net").plans._built.values() if each.kind.compiled]
        assert isinstance(plan.built, ExportExtractor)
        assert engine.host("net").catalogue.scope.rules.state is KeptState.NONE
        [file] = folder.glob("*.plan.pt")
        yield Compiled(engine, folder, file, plan.built)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_values_are_those_at_the_moment_of_the_capture(compiled: Compiled, size: int) -> None:
    """Two inputs, later in-place operations, second calls, members and inputs; any batch size."""
    x = pair(size)
    features = ask(compiled.engine, "net", LAYERS, x, Extractor.EXPORT)
    assert features.extractor.name == "EXPORT"
    for layer, truth in zip(LAYERS, truths(x), strict=True):
        assert difference(features.torch()[layer], truth) <= COMPILED_TOLERANCE[torch.float32]


def test_a_package_has_no_copy_of_the_weights(compiled: Compiled) -> None:
    """The constants of the library are the model's own tensors, where they are."""
    module = compiled.engine.host("net").model.module
    stored = torch.load(compiled.file, weights_only=True)
    assert {"conv.weight", "mix.weight"} <= set(stored["shared"].values())
    assert not any(path.startswith("head") for path in stored["shared"].values())
    before = compiled.extractor._package.run(list(pair(2).values()))[0]
    with torch.no_grad():
        module.conv.weight.mul_(2)
        torch.manual_seed(0)
        doubled = compiled.extractor._package.run([torch.ones(2, *ITEM)] * 2)[0]
        module.conv.weight.div_(2)
        single = compiled.extractor._package.run([torch.ones(2, *ITEM)] * 2)[0]
    assert before.shape == doubled.shape
    assert difference(doubled, single) > 0.01


def test_other_threads_run_during_a_pass(compiled: Compiled, monkeypatch) -> None:
    """Another thread gets its turn many times while the library runs, so the GIL is not held."""
    package = compiled.extractor._package
    call, turns, during = package._library.call, [0], []

    def counted(name: str, *arguments: object) -> None:
        before = turns[0]
        call(name, *arguments)
        during.append(turns[0] - before)

    ended = threading.Event()

    def take_turns() -> None:
        while not ended.is_set():
            turns[0] += 1
            time.sleep(0.0005)

    x = [tensor.contiguous() for tensor in pair(4096).values()]
    other = threading.Thread(target=take_turns)
    other.start()
    try:
        monkeypatch.setattr(package._library, "call", counted)
        package.run(x)
    finally:
        ended.set()
        other.join()
    assert during[0] > 5


def test_inputs_of_other_sizes_and_types_are_refused(compiled: Compiled) -> None:
    """The library itself would read past the end of such an input."""
    left, right = pair(2).values()
    package = compiled.extractor._package
    for wrong in (
        [left],
        [left, right[:1]],
        [left, right.double()],
        [left[:, :2], right[:, :2]],
        [left[:0], right[:0]],
    ):
        with pytest.raises(PackageError, match="expected|was compiled for"):
            package.run(wrong)
    strided = [left.transpose(2, 3), right.transpose(2, 3)]
    plain = [each.contiguous() for each in strided]
    for mine, other in zip(package.run(strided), package.run(plain), strict=True):
        assert torch.equal(mine, other)


def test_images_of_the_usual_size_have_a_package_of_their_own(compiled: Compiled) -> None:
    """It takes no others, and is not tried with them: to try it would start a process in vain."""
    package = compiled.extractor._package
    assert [each.sizes[1:] for each in package._inputs] == [ITEM, ITEM]
    assert compiled.extractor not in compiled.engine.host("net")._measured.builder._portable


def test_one_package_serves_images_of_all_other_sizes(compiled: Compiled, monkeypatch) -> None:
    """Free dimensions are free in the package; it is proven at each size before it serves."""
    compile_once = ExportKind.compile
    compilations = []

    def compile_counted(self: ExportKind, *args: object, **options: object) -> object:
        compilations.append(args)
        return compile_once(self, *args, **options)

    monkeypatch.setattr(ExportKind, "compile", compile_counted)
    for item in ((3, 10, 14), (3, 12, 9)):
        x = pair(3, item)
        features = ask(compiled.engine, "net", LAYERS, x, Extractor.EXPORT)
        for layer, truth in zip(LAYERS, truths(x), strict=True):
            assert difference(features.torch()[layer], truth) <= COMPILED_TOLERANCE[torch.float32]
    assert len(compilations) == 1


def test_a_restart_takes_no_compiler(compiled: Compiled, monkeypatch) -> None:
    """The stored package serves at once: nothing is compiled, and no other process is started."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "/nonexistent")
    for name in ("compile", "run_apart"):
        monkeypatch.setattr(ExportKind, name, None)
    x = pair(3)
    with closing(loaded(compiled.folder)) as engine:
        features = ask(engine, "net", LAYERS, x, Extractor.EXPORT)
        for layer, truth in zip(LAYERS, truths(x), strict=True):
            assert difference(features.torch()[layer], truth) <= COMPILED_TOLERANCE[torch.float32]


def test_a_package_that_won_a_race_serves_auto_after_a_restart(compiled: Compiled) -> None:
    """It is loaded beside the requests, which are served meanwhile."""
    declared = [LayerSelection.parse(layer) for layer in LAYERS]
    spec = ModelSpec("exportnets:hazards", name="net", item_shape=ITEM)
    x, own = pair(2), Extractor.TORCHSCRIPT
    for won in (False, True):
        with closing(Engine(plan_cache=PlanCache(compiled.folder, 1 << 30))) as engine:
            host = engine.load(spec, declared)
            key = next(iter(host.plans._declared))
            ends = time.monotonic() + PATIENCE
            served = [ask(engine, "net", LAYERS, x, Extractor.AUTO).extractor]
            while won and served[-1] is own and time.monotonic() < ends:
                served.append(ask(engine, "net", LAYERS, x, Extractor.AUTO).extractor)
            assert served[-1] is (Extractor.EXPORT if won else own)
            winner = Entrant(Extractor.EXPORT)
            race = Race(Entrant(own), winner, {winner: (2.0, 2.0, 2.0)}, "net")
            kept = KeptRaces(PlanCache(compiled.folder, 1 << 30), host._measured.facts)
            kept.store(Contest.of(key, 2), race)


def test_another_processor_compiles_its_own_package(compiled: Compiled, monkeypatch) -> None:
    """A package for another processor is not found, as its instructions may be missing here."""
    monkeypatch.setattr(ExportKind, "facts", lambda self: "another")

    def compiles(*args: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(ExportKind, "compile", compiles)
    with (
        closing(loaded(compiled.folder)) as engine,
        pytest.raises(ExtractorUnsupportedError, match="planted"),
    ):
        ask(engine, "net", LAYERS, pair(2), Extractor.EXPORT)


def test_without_a_compiler_the_request_is_refused(compiled: Compiled, monkeypatch) -> None:
    """The error says what is missing, and other extractors serve the layers."""
    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(ExtractorUnsupportedError, match=r"takes a C\+\+ compiler.*CXX"):
        ask(compiled.engine, "net", "bn", pair(2), Extractor.EXPORT)
    assert ask(compiled.engine, "net", "bn", pair(2)).extractor is not Extractor.EXPORT


def test_a_branch_on_values_is_refused() -> None:
    """torch.export can't follow it; the layers before it are not refused by the catalogue."""
    with closing(Engine()) as engine:
        engine.load(ModelSpec("exportnets:branches", name="net", item_shape=ITEM))
        x = torch.rand(2, *ITEM)
        with pytest.raises(ExtractorUnsupportedError, match="EXPORT can't serve 'second'"):
            ask(engine, "net", "second", x, Extractor.EXPORT)
        truth = outputs_of(exportnets.branches(), x, "second")[0]
        assert torch.equal(ask(engine, "net", "second", x).torch()["second"], truth)


def test_requests_are_served_while_a_package_is_compiled(monkeypatch) -> None:
    """The compute thread is free meanwhile; a request whose deadline passes leaves no error."""
    may_end = threading.Event()

    def waits(self: ExportKind, program: object) -> Iterator[Pause]:
        while not may_end.is_set():
            yield Pause(0.01)
        raise ProgramEndedError("planted")

    monkeypatch.setattr(ExportKind, "assemble", waits)
    with closing(Engine()) as engine:
        engine.load(ModelSpec("exportnets:remembers", name="net", item_shape=ITEM))
        x = torch.rand(2, *ITEM)
        asked = request_for("net", "first", x, Extractor.EXPORT)
        with pytest.raises(DeadlineExceededError, match="goes on"):
            engine.extract(asked, Call(5.0))
        assert ask(engine, "net", "first", x).extractor is Extractor.HOOK
        may_end.set()
        with pytest.raises(ExtractorUnsupportedError, match="planted"):
            engine.extract(asked, Call())


def test_what_a_model_keeps_of_its_recording_is_dropped(monkeypatch) -> None:
    """A tensor without elements, kept by the model, would be in the next request's pass."""
    monkeypatch.setattr(ExportKind, "assemble", None)  # It is recorded, and no more.
    with closing(Engine()) as engine:
        engine.load(ModelSpec("exportnets:remembers", name="net", item_shape=ITEM))
        x = torch.rand(2, *ITEM)
        with pytest.raises(Exception, match=r"EXPORT can't serve|not callable"):
            ask(engine, "net", "first", x, Extractor.EXPORT)
        assert engine.host("net").model.module.memory.kept is None
        truth = outputs_of(exportnets.remembers(), x, "first")[0]
        assert torch.equal(ask(engine, "net", "first", x).torch()["first"], truth)


@pytest.mark.skipif(Extractor.EXPORT.automatic, reason="AUTO uses it on this Python")
def test_auto_does_not_use_it(compiled: Compiled) -> None:
    """Nobody waits for a compiler without having asked for it; a request must name EXPORT."""
    host = compiled.engine.host("net")
    entry = host.catalogue.entry("mix")
    assert Extractor.EXPORT in entry.served_by(next(iter(entry.points)))
    for _ in range(6):
        assert ask(compiled.engine, "net", ["conv"], pair(2)).extractor is not Extractor.EXPORT
    assert {Extractor.EXPORT} == SLOW


def test_auto_uses_it_where_there_is_no_torchscript(compiled: Compiled, monkeypatch) -> None:
    """As on Python 3.14: once the plan is ready, and HOOK until then."""
    monkeypatch.setattr(Extractor.EXPORT, "automatic", True)
    monkeypatch.setattr(torchscript, "trace_taps", None)
    monkeypatch.setattr(ExportKind, "compile", None)  # The package is stored already.
    x, seen = pair(2), []
    with closing(loaded(compiled.folder)) as engine:
        ends = time.monotonic() + PATIENCE
        while Extractor.EXPORT not in seen and time.monotonic() < ends:
            features = ask(engine, "net", LAYERS, x)
            seen.append(features.extractor)
            time.sleep(0.01)
    assert list(dict.fromkeys(seen)) == [Extractor.HOOK, Extractor.EXPORT]
    for layer, truth in zip(LAYERS, truths(x), strict=True):
        assert difference(features.torch()[layer], truth) <= COMPILED_TOLERANCE[torch.float32]


def library(tmp_path: Path, code: str) -> bytes:
    """Compile a shared library that is no package."""
    source, made = tmp_path / "a.c", tmp_path / "a.so"
    source.write_text(code)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", made, source], check=True)  # noqa: S607
    return made.read_bytes()


def test_a_library_that_ends_its_process_ends_a_child_process_only(tmp_path: Path) -> None:
    """So a package that crashes is refused, and the server goes on."""
    code = "#include <stdlib.h>\n__attribute__((constructor)) void f(void) { abort(); }"
    steps = packager.run_package(library(tmp_path, code), {}, (), 1, [])
    with pytest.raises(packager.SideProcessError, match="killed by SIGABRT"):
        run_to_end(steps)


def test_a_file_that_is_no_package_is_refused(tmp_path: Path) -> None:
    """Bytes that are no library at all, and a library that lacks the functions of a package."""
    with pytest.raises(PackageError, match="can't be loaded"):
        LoadedPackage(b"no library")
    with pytest.raises(PackageError, match="lacks the function AOTInductorModelContainerCreate"):
        LoadedPackage(library(tmp_path, "int nothing;"))


def test_a_compilation_that_is_given_up_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    """Its process is ended and its folder removed."""
    monkeypatch.setattr(packager.tempfile, "tempdir", str(tmp_path))
    steps = packager.run_package(b"", {}, (InputShape("float32", (1,), (1,)),), 1, [])
    next(steps)
    assert list(tmp_path.iterdir())
    steps.close()
    assert not list(tmp_path.iterdir())
