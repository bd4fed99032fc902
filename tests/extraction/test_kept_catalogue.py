"""A kept catalogue is the measured one, or is not used."""

from __future__ import annotations

import importlib
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layertap.extraction.kept_catalogue as kept_module
from asking import ask
from layertap import Extractor
from layertap.engine import Engine
from layertap.engine.host import ModelHost
from layertap.extraction.code_identity import UnknownCodeError, code_identity
from layertap.extraction.plan_cache import PlanCache
from layertap.extraction.tf32 import allow_tf32, tf32_allowed
from layertap.models import ModelSpec
from layertap.selection import LayerSelection
from quick import QUICK
from tinynets import ITEM

PLENTY = 1 << 30

KEPT = {
    "tinynets:residual": ITEM,
    "tinynets:containers": ITEM,
    "tinynets:branching": ITEM,
    "tinynets:numbered": ITEM,
    "tinynets:asserts": ITEM,
    "tinynets:tokens": ITEM,
    "layoutnets:small_swin": (3, 64, 64),
    "claimnets:repeats": ITEM,
    "batchnets:mixes": ITEM,
    "batchnets:interleaved": ITEM,
    "guardnets:sign": ITEM,
    "oddnets:clamps": ITEM,
    "namednets:joined": ITEM,
    "severalnets:optional": (6,),
    "contentnets:quantised": (6,),
    "severalnets:lengths": (6,),
}
"""Awkward models whose catalogue is kept, and the shape of their items."""

QUICKLY_KEPT = {
    "tinynets:residual",
    "tinynets:tokens",
    "guardnets:sign",
    "severalnets:optional",
    "contentnets:quantised",
}
"""Those that every run of the tests loads."""


@dataclass
class Loaded:
    """A loaded model, and what the log said of kept catalogues."""

    host: ModelHost
    engine: Engine
    log: str


Load = Callable[..., Loaded]


@pytest.fixture
def load(caplog: pytest.LogCaptureFixture) -> Iterator[Load]:
    """Load a model like a process that has just started."""
    engines: list[Engine] = []

    def start(
        folder: Path | None, source: str = "tinynets:chain", item: Any = ITEM, *layers: str
    ) -> Loaded:
        caplog.clear()
        cache = None if folder is None else PlanCache(folder, PLENTY)
        engine = Engine(plan_cache=cache)
        engines.append(engine)
        spec = ModelSpec(source, name="net", item_shape=item)
        with caplog.at_level(logging.INFO):
            host = engine.load(spec, [LayerSelection(layer) for layer in layers])
        return Loaded(host, engine, caplog.text)

    yield start
    for engine in engines:
        engine.close()


def facts(host: ModelHost) -> dict[str, Any]:
    """Everything that a catalogue says."""
    found = host.catalogue
    graph = found.graph and (found.graph.train, list(found.graph.targets.items()))
    return {
        **{name: getattr(found, name) for name in ("key", "mutates_input", "notes", "non_finite")},
        "entries": list(found.entries.items()),
        "graph": graph,
        "looks": found.looks,
        "varying": found.varying,
        "towers": {tower: set(points) for tower, points in found.towers.items()},
        "rules": found.scope.rules,
        "signature": host.model.signature,
    }


def was_kept(loaded: Loaded) -> bool:
    return "is the one of an earlier start" in loaded.log


def catalogue_file(folder: Path) -> Path:
    (file,) = folder.glob("*.catalogue")
    return file


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the catalogue of ``tinynets:chain``, as its first start left it."""
    folder = tmp_path_factory.mktemp("first")
    engine = Engine(plan_cache=PlanCache(folder, PLENTY))
    engine.load(ModelSpec("tinynets:chain", name="net", item_shape=ITEM))
    engine.close()
    return folder


@pytest.fixture
def started(first: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    folder = tmp_path / "started"
    shutil.copytree(first, folder)
    return folder


@pytest.mark.parametrize(
    "source",
    [each if each in QUICKLY_KEPT else pytest.param(each, marks=pytest.mark.long) for each in KEPT],
)
def test_a_kept_catalogue_is_the_measured_one(load, tmp_path, source) -> None:
    """At the first start, which measures, and at the second, a model has one catalogue."""
    first, second = (load(tmp_path, source, KEPT[source]) for _ in range(2))
    assert (was_kept(first), was_kept(second)) == (False, True)
    assert facts(first.host) == facts(second.host)


@pytest.mark.parametrize(
    "extractor",
    [
        Extractor.AUTO,
        Extractor.TORCHSCRIPT,
        *(
            pytest.param(each, marks=pytest.mark.long)
            for each in QUICK
            if each is not Extractor.TORCHSCRIPT
        ),
    ],
)
def test_answers_are_the_same(load, tmp_path, extractor) -> None:
    """Every layer that an extractor serves has the same bits with a kept catalogue."""
    loads = [load(tmp_path, "tinynets:residual", ITEM) for _ in range(2)]
    assert [was_kept(each) for each in loads] == [False, True]
    x = torch.rand(2, *ITEM, generator=torch.Generator().manual_seed(3))
    # What hooks serve, AUTO serves in one pass.
    serving = Extractor.HOOK if extractor is Extractor.AUTO else extractor
    names = [entry.name for entry in loads[0].host.catalogue if not entry.refusal(serving)]
    assert names
    middle = len(names) // 2
    # All of them in one pass, and some alone, whose plans end early.
    for asked in (names, names[:1], names[middle : middle + 1], names[-1:]):
        one, other = (ask(each.engine, "net", asked, x, extractor) for each in loads)
        assert all((one[name] == other[name]).all() for name in asked)


def test_refusals_are_the_same(load, tmp_path) -> None:
    """A layer that measuring refuses is refused by a kept catalogue, with the same reason."""
    loads = [load(tmp_path, "tinynets:silent", ITEM) for _ in range(2)]
    assert was_kept(loads[1])
    reasons = [
        [entry.refusal(extractor) for entry in each.host.catalogue for extractor in entry.support]
        for each in loads
    ]
    assert reasons[0] == reasons[1]
    assert any(reasons[0])


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("oddnets:remembers", "its passes write state"),
        ("proofnets:noisy", "draws random numbers"),
        ("hardnets:threads", "the model.pool"),
        ("oddnets:scripted", "ScriptModule"),
    ],
)
def test_what_cannot_be_compared_is_measured_at_each_start(load, tmp_path, source, why) -> None:
    """State, chance, threads and compiled parts: then there is no file, and the log says why."""
    for _ in range(2):
        loaded = load(tmp_path, source, ITEM)
        assert why in loaded.log
        assert not was_kept(loaded)
    assert list(tmp_path.glob("*.catalogue")) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-100],
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b"conv1", b"conv2"),
        lambda data: b"\x80\x04" + data,
        lambda data: b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_replaced(load, started, damage) -> None:
    """Empty, truncated, changed and foreign files: the log says so, and the next start has one."""
    file = catalogue_file(started)
    file.write_bytes(damage(file.read_bytes()))
    fresh = load(started)
    assert "is measured again: its kept catalogue is damaged" in fresh.log
    again = load(started)
    assert was_kept(again)
    assert facts(fresh.host) == facts(again.host)


def test_a_forged_file_of_the_right_checksum_is_replaced(load, started) -> None:
    """A record that is no catalogue is refused when it is read, whatever its checksum says."""
    file = catalogue_file(started)
    _, _, body = file.read_bytes().partition(b"\n")
    forged = body.replace(b'"value":', b'"value":0,"was":')
    file.write_bytes(kept_module._checksum(forged).encode() + b"\n" + forged)
    assert "is damaged" in load(started).log


FACTS = (
    "format", "layertap", "extractors", "Python", "torch", "torchvision", "numpy", "model",
    "inputs", "samples", "weights", "code", "device", "processor", "threads", "numerics",
    "environment",
)  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_every_fact_counts(load, started, monkeypatch, name) -> None:
    """If any fact differs, the model is measured again, and the log names the fact."""
    whole = kept_module.facts_of

    def other(model: Any, weights: str) -> dict[str, str]:
        known = whole(model, weights)
        assert set(known) == set(FACTS)
        return {**known, name: "another"}

    monkeypatch.setattr(kept_module, "facts_of", other)
    fresh = load(started)
    assert f"is for others of these: {name}" in fresh.log
    assert not was_kept(fresh)


def test_facts_follow_the_machine_and_its_settings(load, started, monkeypatch) -> None:
    """Threads, an environment variable and a setting of torch are seen."""
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "SSE41")
    assert "others of these: environment" in load(started).log
    monkeypatch.delenv("DNNL_MAX_CPU_ISA")
    assert "others of these: environment" in load(started).log
    torch.use_deterministic_algorithms(mode=True)
    try:
        assert "others of these: numerics" in load(started).log
    finally:
        torch.use_deterministic_algorithms(mode=False)


def test_settings_of_cuda_are_no_facts_of_a_model_on_a_cpu(load, started) -> None:
    """`layertap.load` sets TF32, which means nothing to a CPU."""
    before = tf32_allowed()
    try:
        for allowed in (True, False):
            allow_tf32(allowed)
            assert was_kept(load(started))
    finally:
        allow_tf32(before)


def test_the_precision_of_matrix_products_is_a_fact(load, started) -> None:
    """On a CPU, too, float32 may be rounded to bfloat16 in them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert "others of these: numerics" in load(started).log
    finally:
        torch.set_float32_matmul_precision(before)


NET = """
import torch
from torch import nn
import helper_of_net

SCALE = 1.0

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.power = 1
    def forward(self, x):
        return helper_of_net.shifted(self.conv(x)) * SCALE ** self.power

def build():
    torch.manual_seed(0)
    return Net().eval()
"""
HELPER = "def shifted(x):\n    return x + 1.0\n"


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder with the source of a net, which every load imports again."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "net_of_test.py").write_text(NET)
    (folder / "helper_of_net.py").write_text(HELPER)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield folder
    forget()


def forget() -> None:
    for name in ("net_of_test", "helper_of_net"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


@pytest.mark.parametrize(
    "change",
    [
        ("net_of_test.py", "self.conv(x)", "self.conv(x).relu()"),
        ("net_of_test.py", "SCALE = 1.0", "SCALE = 2.0"),
        ("net_of_test.py", "self.power = 1", "self.power = 2"),
        ("helper_of_net.py", "x + 1.0", "x - 1.0"),
        ("helper_of_net.py", "x + 1.0", "x + 1.0  # the same, but who knows"),
    ],
)
def test_changed_source_is_measured_again(load, tmp_path, sources, change) -> None:
    """A change of the class, a global, an attribute or a file that it imports is seen."""
    cache, (file, before, after) = tmp_path / "cache", change
    load(cache, "net_of_test:build", ITEM)
    forget()
    assert was_kept(load(cache, "net_of_test:build", ITEM))
    path = sources / file
    path.write_text(path.read_text().replace(before, after))
    forget()
    fresh = load(cache, "net_of_test:build", ITEM)
    assert "others of these: code" in fresh.log
    assert not was_kept(fresh)


def test_a_pass_shows_what_no_digest_shows(load, tmp_path, sources, monkeypatch) -> None:
    """If a file that the code reads has changed, the pass differs, and it is measured again."""
    data = sources / "scale.txt"
    data.write_text("1.0")
    (sources / "helper_of_net.py").write_text(
        "from pathlib import Path\n"
        f"def shifted(x):\n    return x + float(Path({str(data)!r}).read_text())\n"
    )
    cache = tmp_path / "cache"
    load(cache, "net_of_test:build", ITEM)
    forget()
    assert was_kept(load(cache, "net_of_test:build", ITEM))
    data.write_text("3.0")
    forget()
    fresh = load(cache, "net_of_test:build", ITEM)
    assert "does not fit it: 'the model' returns another value" in fresh.log


def test_other_weights_have_a_catalogue_of_their_own(load, started, monkeypatch) -> None:
    """Servers with two versions of the weights don't take each other's file."""
    whole = kept_module.fingerprint
    monkeypatch.setattr(kept_module, "fingerprint", lambda model: whole(model) + "0")
    assert not was_kept(load(started))
    assert len(list(started.glob("*.catalogue"))) == 2
    assert was_kept(load(started))


def test_two_servers_may_write_at_once(tmp_path) -> None:
    """Both are served, and leave whole files only."""

    def start(_: int) -> dict[str, Any]:
        engine = Engine(plan_cache=PlanCache(tmp_path, PLENTY))
        try:
            return facts(engine.load(ModelSpec("tinynets:chain", name="net", item_shape=ITEM)))
        finally:
            engine.close()

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(start, range(2))
    assert one == other
    assert start(2) == one
    # In one process, two nets may draw their weights from one seed in turn: two models.
    files = list(tmp_path.glob("*.catalogue"))
    assert files
    for file in files:
        kept_module._unpacked(file)
    assert [file.name for file in tmp_path.glob("*.part")] == []


def test_a_folder_that_cannot_be_written_is_no_fault(load, tmp_path, monkeypatch) -> None:
    """On a read-only disk nothing is kept, the log says so, and the model is served."""

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(PlanCache, "write", refuse)
    loaded = load(tmp_path)
    assert "its catalogue is not kept: Read-only file system" in loaded.log
    assert list(tmp_path.iterdir()) == []


def test_it_can_be_turned_off(tmp_path) -> None:
    """Without catalogues the folder has plans only."""
    engine = Engine(plan_cache=PlanCache(tmp_path, PLENTY, catalogues=False))
    try:
        engine.load(ModelSpec("tinynets:chain", item_shape=ITEM), [LayerSelection("layer1")])
    finally:
        engine.close()
    assert {file.suffix for file in tmp_path.iterdir()} == {".pt"}


def test_a_kept_proof_needs_the_same_program(load, tmp_path, caplog) -> None:
    """A kept proof is used for its program only; for another one the proof is repeated."""
    load(tmp_path, "tinynets:chain", ITEM, "layer1")
    (proof,), (program,) = tmp_path.glob("*.proof"), tmp_path.glob("*.plan.pt")
    again = load(tmp_path, "tinynets:chain", ITEM, "layer1")
    assert was_kept(again)
    (plan,) = again.host.plans._declared.values()
    assert plan.refusal(1) == plan.refusal(2) == plan.refusal(3) == ""
    proof.write_text(proof.read_text().replace('"program": "', '"program": "0'))
    fresh = load(tmp_path, "tinynets:chain", ITEM, "layer1")
    assert "is for something else" in fresh.log
    x = torch.rand(2, *ITEM)
    one, other = (ask(each.engine, "net", "layer1", x)["layer1"] for each in (again, fresh))
    assert (one == other).all()
    assert program.exists()


def test_identity_ignores_weights_and_follows_the_rest() -> None:
    """Weights are compared elsewhere; attributes, also nested ones, count."""

    def net(number: int) -> nn.Module:
        made = nn.Linear(2, 2)
        made.table = {"a": [number, {1, 2}]}
        return made

    assert code_identity(net(1)) == code_identity(net(1))
    assert code_identity(net(1)) != code_identity(net(2))


def test_identity_of_the_unknown_is_refused() -> None:
    """An object whose content can't be read has no identity, and its place is named."""
    made = nn.Linear(2, 2)
    made.source = iter([1, 2])
    with pytest.raises(UnknownCodeError, match=r"the model\.source"):
        code_identity(made)


def test_identity_sees_a_replaced_method() -> None:
    """Replacing a method of a class is a change of the code."""
    before = code_identity(Patched())
    whole = Patched.forward
    Patched.forward = lambda self, x: x + 1  # type: ignore[method-assign]
    try:
        assert code_identity(Patched()) != before
    finally:
        Patched.forward = whole  # type: ignore[method-assign]
    assert code_identity(Patched()) == before


class Patched(nn.Module):
    """A net whose method a test replaces."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x
