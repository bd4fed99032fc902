"""State that passes leave behind changes no answer: each is a fresh module's first answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import pytest
import torch

import asking
import statefulnets
from kept import kept
from layertap import Extractor, LayerSelection, errors
from layertap.engine import Engine, HostOptions
from layertap.extraction.passes import KeptState
from layertap.models import ModelSpec
from layertap.selection import Capture
from oracle import outputs_of
from quick import QUICK
from statefulnets import NETS
from tinynets import ITEM

RANDOM = {"Noisy"}
KEPT = {"Cycles"}
EQUAL = sorted(set(NETS) - RANDOM - KEPT)
"""Nets whose answers are those of a fresh module; the others are random or reported stateful."""


OF_THE_THREAD = ("PerThread", "OwnChance", "Recurrent", "Fills")
"""Nets that one thread serves as well: each request then finds what the one before it left."""


@pytest.fixture(params=[1, 2], ids=["latency", "throughput"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine of each mode."""
    engine = Engine(threads=1, instances=request.param, plan_cache=kept())
    yield engine
    engine.close()


@pytest.fixture
def factories(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each net a factory of the module ``freshnets``."""
    module = ModuleType("freshnets")
    for name in NETS:
        setattr(module, name, lambda name=name: statefulnets.build(name))
    monkeypatch.setitem(sys.modules, "freshnets", module)


def load(engine: Engine, name: str, *declared: str) -> None:
    layers = [LayerSelection.parse(layer) for layer in declared]
    engine.load(ModelSpec(f"freshnets:{name}", name, item_shape=ITEM), layers)


def inputs() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    sizes = ((1, 0.1), (2, 1), (1, 3), (3, 1))
    return [generator.standard_normal((n, *ITEM)).astype(np.float32) * scale for n, scale in sizes]


def fresh(name: str, layer: str, x: np.ndarray) -> torch.Tensor:
    """Return what a module that never ran returns at a layer."""
    net = statefulnets.build(name)
    if name == "OwnModes":
        net.drop.training = False
    with torch.inference_mode():
        value = outputs_of(net, torch.from_numpy(x), layer.removesuffix(".0"))[0]
    return value[0] if isinstance(value, tuple) else value


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("engine", "name"),
    [*((2, name) for name in EQUAL), *((1, name) for name in OF_THE_THREAD)],
    indirect=["engine"],
)
def test_each_answer_is_that_of_a_fresh_module(engine: Engine, name: str) -> None:
    """For an early and a declared layer, by each extractor, with callers in turn and at once."""
    layers = ["out", "rnn.0" if name == "BatchStart" else "first"]
    truth = {
        (layer, index): fresh(name, layer, x)
        for layer in layers
        for index, x in enumerate(inputs())
    }
    load(engine, name, "out")

    def check(layer: str, index: int, extractor: Extractor) -> None:
        try:
            reply = asking.ask(engine, name, layer, inputs()[index], extractor)
        except errors.ExtractorUnsupportedError:
            assert extractor not in (Extractor.HOOK, Extractor.AUTO)
            return
        value, expected = reply.torch()[layer], truth[layer, index]
        assert value.shape == expected.shape
        assert torch.allclose(value, expected, rtol=1e-4, atol=1e-5), (layer, index, extractor)

    work = [
        (layer, i, extractor)
        for extractor in (Extractor.AUTO, *QUICK)
        for i in range(4)
        for layer in layers
    ]
    for each in work:
        check(*each)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, *zip(*work, strict=True)))


@pytest.mark.usefixtures("factories")
def test_a_pass_that_ended_early_leaves_no_activations(engine: Engine) -> None:
    """The same holds for a model that runs to its end and keeps activations."""
    for name in ("Skips", "Fills", "KeptByHooks"):
        load(engine, name)
        asking.ask(engine, name, "second", inputs()[0], Extractor.HOOK)
        module = engine.host(name).model.module
        left = [getattr(module, key, None) for key in ("skips", "features")]
        left += [kept.features for kept in getattr(module, "kept", ())]
        assert not any(isinstance(value, torch.Tensor) or value for value in left)


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize("name", ["BatchStart", "Recurrent"])
def test_a_model_that_carries_state_is_never_compiled(engine: Engine, name: str) -> None:
    """A program would hold the example's state, and native code would rely on its size."""
    load(engine, name, "out")
    with pytest.raises(errors.ExtractorUnsupportedError, match="keeps state between calls"):
        asking.ask(engine, name, "out", inputs()[1], Extractor.TORCHSCRIPT)
    assert asking.ask(engine, name, "out", inputs()[1]).extractor is Extractor.HOOK


@pytest.mark.usefixtures("factories")
def test_what_can_not_be_put_back_is_reported(engine: Engine) -> None:
    """The model's passes run to their end, by HOOK only, and the catalogue says stateful."""
    load(engine, "Cycles")
    catalogue = engine.host("Cycles").catalogue
    rules = catalogue.scope.rules
    assert rules.state is KeptState.KEPT
    assert not any((rules.early_stop, rules.concurrent, rules.shared))
    assert any("answers may depend on earlier requests" in note for note in rules.notes)
    assert catalogue.entry("first").served_by(Capture.OUTPUT) == [Extractor.HOOK]


@pytest.mark.usefixtures("factories")
def test_a_stateful_model_answers_as_the_calls_of_a_plain_module_do(engine: Engine) -> None:
    """From its first call on: another instance was measured, and learns of other sizes."""
    net, other = statefulnets.build("Cycles"), np.ones((1, 3, 24, 24), np.float32)
    load(engine, "Cycles", "out")
    for x in (inputs()[0], other, inputs()[1], other, inputs()[0]):
        with torch.inference_mode():
            expected = outputs_of(net, torch.from_numpy(x), "out")[0]
        value = asking.ask(engine, "Cycles", "out", x).torch()["out"]
        assert torch.allclose(value, expected, atol=1e-5)


@pytest.mark.usefixtures("factories")
def test_state_that_only_other_sizes_show_is_put_back_too(engine: Engine) -> None:
    """The rules become stricter when a pass of another size is seen to write state."""
    load(engine, "Grows")
    scope = engine.host("Grows").catalogue.scope
    x = np.ones((1, 3, 24, 24), np.float32)
    expected = fresh("Grows", "out", x)
    for _ in range(3):
        value = asking.ask(engine, "Grows", "out", x, Extractor.HOOK).torch()["out"]
        assert torch.allclose(value, expected, atol=1e-5)
    assert scope.rules.state is KeptState.RESET


@pytest.mark.usefixtures("factories")
def test_a_sink_that_refuses_does_not_end_a_pass_that_must_run_to_its_end() -> None:
    """A stateful model's pass always runs to its end, whatever happens to its request."""
    engine = Engine(threads=1, plan_cache=kept())
    load(engine, "Cycles")
    host = engine.host("Cycles")
    ended = []
    host.model.module.out.register_forward_hook(lambda *_: ended.append(1))
    x = inputs()[0]
    x[0, 0, 0, 0] = np.nan
    host.options = HostOptions(require_finite=True)
    with pytest.raises(errors.ModelRunError, match="NaN"):
        asking.ask(engine, "Cycles", "first", x, Extractor.HOOK)
    assert ended == [1]
    engine.close()
