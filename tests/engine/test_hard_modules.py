"""Models with scripted parts, quantised parts, complex values or their own threads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import asking
import hardnets
from kept import kept
from layertap import Extractor, LayerSelection, errors
from layertap.engine import Engine
from layertap.extraction.plan_cache import PlanCache
from layertap.models import ModelSpec
from layertap.selection import Capture
from oracle import outputs_of
from quick import QUICK

ITEM = (3, 16, 16)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine for all tests; see ``load``."""
    engine = Engine(plan_cache=kept())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def busy() -> Iterator[Engine]:
    """An engine that runs several passes at the same time."""
    engine = Engine(instances=2, threads=1, plan_cache=kept())
    yield engine
    engine.close()


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand((2, *ITEM), generator=torch.Generator().manual_seed(seed))


def load(engine: Engine, net: str) -> torch.nn.Module:
    """Load a net unless a test before has; return a fresh one."""
    if net not in {host.model.name for host in engine.hosts()}:
        engine.load(ModelSpec(f"hardnets:{net}", item_shape=ITEM))
    return getattr(hardnets, net)()


def check(engine: Engine, net: str, layer: str, right: torch.Tensor, seed: int = 0) -> None:
    for extractor in (Extractor.AUTO, Extractor.HOOK):
        got = asking.ask(engine, net, layer, images(seed), extractor)[layer]
        np.testing.assert_allclose(got, right.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", ["conv", "first", "second", "last", "output"])
def test_a_model_with_scripted_parts(engine, layer) -> None:
    """Eager modules and calls of programs have the values that hooks see."""
    fresh = load(engine, "scripted")
    seen: list[torch.Tensor] = []
    module = fresh if layer == "output" else fresh.get_submodule(layer)
    torch.nn.Module.register_forward_hook(module, lambda _, __, out: seen.append(out.clone()))
    fresh(images())
    check(engine, "scripted", layer, seen[0])


@pytest.mark.parametrize("program", ["first", "second"])
def test_layers_inside_scripted_parts(engine, program) -> None:
    """Inner layers of each program have their own values, although both share one graph."""
    fresh = load(engine, "scripted")
    (y,) = outputs_of(fresh, images(), "conv")
    inner = fresh.get_submodule(program).inner(torch.relu(y))
    check(engine, "scripted", f"{program}.inner", inner)
    check(engine, "scripted", f"{program}.last", fresh.get_submodule(program).last(inner))
    entry = engine.host("scripted").catalogue.entry(f"{program}.last")
    assert entry.calls == 1
    assert "is a TorchScript program already" in entry.refusal(Extractor.TORCHSCRIPT)


def test_the_result_of_a_program(engine, tmp_path) -> None:
    """The result of a TorchScript file has the reserved name too."""
    net = hardnets.Head().eval()
    file = tmp_path / "head.pt"
    with warnings.catch_warnings():
        # Torch deprecates TorchScript.
        warnings.simplefilter("ignore")
        torch.jit.save(hardnets.script(net), file)
    engine.load(ModelSpec(str(file), item_shape=(4, 8, 8)))
    x = torch.rand(2, 4, 8, 8)
    for layer, right in (("output", net(x)), ("inner", net.inner(x))):
        got = asking.ask(engine, "head", layer, x)[layer]
        np.testing.assert_allclose(got, right.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", ["quant", "conv", "relu", "dequant", "head"])
def test_quantised_layers_are_sent_dequantised(engine, layer) -> None:
    """The values are those of dequantize(), and the catalogue has the quantised type."""
    fresh = load(engine, "quantized")
    (value,) = outputs_of(fresh, images(), layer)
    spec = engine.host("quantized").catalogue.entry(layer).specs[Capture.OUTPUT]
    assert spec.quantized == ("quint8" if value.is_quantized else "")
    assert spec.dtype is torch.float32
    right = value.dequantize() if value.is_quantized else value
    claimed = engine.host("quantized").catalogue.entry(layer).served_by(Capture.OUTPUT)
    for extractor in (Extractor.AUTO, *filter(QUICK.__contains__, claimed)):
        try:
            got = asking.ask(engine, "quantized", layer, images(), extractor)[layer]
        except errors.ExtractorUnsupportedError:
            assert extractor not in (Extractor.AUTO, Extractor.HOOK)
            continue
        # A rounding that falls on the other side is one step of the scale off.
        np.testing.assert_allclose(got, right.numpy(), atol=1e-5)


def test_declared_quantised_layers_are_kept(tmp_path) -> None:
    """A quantised model's declared layers load with a plan cache, twice."""
    right = hardnets.quantized()(images())
    for _ in range(2):
        engine = Engine(plan_cache=PlanCache(tmp_path, 64 << 20))
        spec = ModelSpec("hardnets:quantized", item_shape=ITEM)
        try:
            engine.load(spec, [LayerSelection("conv"), LayerSelection("output")])
            got = asking.ask(engine, "quantized", "output", images())["output"]
        finally:
            engine.close()
        np.testing.assert_allclose(got, right.numpy(), atol=1e-5)


def test_dynamic_quantisation(engine) -> None:
    """Layers that are quantised while they run give the values of a fresh model."""
    fresh = load(engine, "dynamic")
    for layer in ("first", "second"):
        (right,) = outputs_of(fresh, images(), layer)
        check(engine, "dynamic", layer, right)


def test_complex_values_are_refused_in_the_catalogue(engine) -> None:
    """No extractor claims them, the reason names the type, and later layers are served."""
    fresh = load(engine, "spectrum")
    catalogue = engine.host("spectrum").catalogue
    assert catalogue.entry("fourier").served_by(Capture.OUTPUT) == []
    assert catalogue.entry("back").served_by(Capture.INPUT) == []
    with pytest.raises(errors.ExtractorUnsupportedError, match="complex64, a dtype that layertap"):
        asking.ask(engine, "spectrum", "fourier", images())
    with pytest.raises(errors.ExtractorUnsupportedError, match="complex64, a dtype that layertap"):
        asking.ask(engine, "spectrum", "back:input", images())
    for layer in ("back", "out"):
        (right,) = outputs_of(fresh, images(), layer)
        check(engine, "spectrum", layer, right)


@pytest.mark.parametrize("layer", ["stem", "a", "a.0", "b", "head", "output"])
def test_modules_in_a_thread_pool_of_the_models_own(busy, layer) -> None:
    """Many concurrent callers get their own values, even of modules in the pool's threads."""
    fresh = load(busy, "threads")
    module = fresh if layer == "output" else fresh.get_submodule(layer)
    right = []
    for seed in range(8):
        handle = module.register_forward_hook(lambda _, __, out: right.append(out.clone()))
        fresh(images(seed))
        handle.remove()
    with ThreadPoolExecutor(4) as callers:
        replies = callers.map(
            lambda seed: asking.ask(busy, "threads", layer, images(seed))[layer],
            list(range(8)) * 4,
        )
        for index, got in enumerate(replies):
            np.testing.assert_allclose(got, right[index % 8].numpy(), rtol=1e-4, atol=1e-5)


def test_calls_in_threads_have_no_order(engine) -> None:
    """A module that runs twice in the pool is refused, and the model is not compiled."""
    load(engine, "threads")
    catalogue = engine.host("threads").catalogue
    for name in ("twice", "twice_1"):
        assert catalogue.entry(name).served_by(Capture.OUTPUT) == []
        assert "the model's own threads" in catalogue.entry(name).refusal(Extractor.HOOK)
    assert catalogue.entry("a").served_by(Capture.OUTPUT) == [Extractor.HOOK]
