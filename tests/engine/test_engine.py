"""The engine builds each plan once, and serves declared layers with compiled plans."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import asking
import tinynets
from kept import kept
from layertap import Extractor, Features, LayerSelection, errors
from layertap.engine import Call, Engine, HostOptions, Limits
from layertap.engine.promotion import PROMOTE_AFTER
from layertap.extraction import PointKind
from layertap.extraction.passes import PassRules
from layertap.models import ModelSpec
from oracle import outputs_of
from tinynets import ITEM, residual


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine that keeps two plans besides the declared ones."""
    engine = Engine(Limits(plans=2), plan_cache=kept())
    yield engine
    engine.close()


def load(engine: Engine, net: str, *layers: str) -> None:
    declared = [LayerSelection.parse(layer) for layer in layers]
    engine.load(ModelSpec(f"tinynets:{net}", item_shape=ITEM), declared)


def ask(
    engine: Engine, net: str, *layers: str, extractor: Extractor = Extractor.AUTO, side: int = 16
) -> Features:
    x = np.random.default_rng(0).random((2, 3, side, side), dtype=np.float32)
    return asking.ask(engine, net, layers, x, extractor)


def graph_node(engine: Engine) -> str:
    """Return a node of the residual net's graph that is not a module: the sum in a block."""
    catalogue = engine.host("residual").catalogue
    return next(e.name for e in catalogue if e.kind is PointKind.NODE and "add" in e.type)


def passes(engine: Engine, net: str) -> list[int]:
    """Count the model's forward passes from now on, as the length of the list."""
    counted: list[int] = []
    module = engine.host(net).model.module
    module.register_forward_pre_hook(lambda m, a: counted.append(1))
    return counted


def test_auto_serves_declared_layers_compiled_together_and_alone(engine) -> None:
    """The declared set and each of its members use TORCHSCRIPT, anything else uses HOOK."""
    load(engine, "residual", "layer1", "avgpool:input")
    assert ask(engine, "residual", "avgpool:input", "layer1").extractor is Extractor.TORCHSCRIPT
    assert ask(engine, "residual", "layer1").extractor is Extractor.TORCHSCRIPT
    assert ask(engine, "residual", "layer2").extractor is Extractor.HOOK
    assert ask(engine, "residual", "layer1", "layer2").extractor is Extractor.HOOK


def test_a_compiled_plan_serves_its_own_item_shape_only(engine) -> None:
    """Items of another size are served by HOOK, with the values for that size."""
    load(engine, "residual", "layer1")
    features = ask(engine, "residual", "layer1", side=24)
    assert features.extractor is Extractor.HOOK
    assert features["layer1"].shape == (2, 8, 12, 12)


def test_auto_falls_back_to_fx_for_graph_nodes(engine) -> None:
    """A layer that only the graph has is served by FX, even if FX is not requested."""
    load(engine, "residual")
    node = next(
        e.name for e in engine.host("residual").catalogue if e.kind == "node" and "add" in e.type
    )
    assert ask(engine, "residual", node, "layer1").extractor is Extractor.FX


def test_layers_that_no_extractor_serves_together_are_refused(engine) -> None:
    """No extractor serves both a graph node and an input."""
    load(engine, "residual")
    node = next(
        e.name for e in engine.host("residual").catalogue if e.kind == "node" and "add" in e.type
    )
    with pytest.raises(errors.ExtractorUnsupportedError, match="together"):
        ask(engine, "residual", node, "layer1:input")


def test_a_declared_layer_of_a_torchscript_file_is_served_by_hook(engine, tmp_path: Path) -> None:
    """A model that is compiled already can be declared, and is warmed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated upstream, its files are not.
        torch.jit.trace(residual(), torch.rand(1, *ITEM)).save(str(tmp_path / "net.pt"))
    spec = ModelSpec(str(tmp_path / "net.pt"), item_shape=ITEM)
    engine.load(spec, [LayerSelection("layer1.0.bn1")])
    assert ask(engine, "net", "layer1.0.bn1").extractor is Extractor.HOOK


def test_cuda_graphs_change_nothing_on_a_cpu(engine, caplog) -> None:
    """The same configuration works on machines with and without a GPU."""
    load(engine, "residual", "layer1")
    spec = ModelSpec("tinynets:residual", "again", item_shape=ITEM)
    options = HostOptions(cuda_graphs=(1, 2))
    engine.load(spec, [LayerSelection("layer1")], options=options)
    x = np.random.default_rng(0).random((2, *ITEM), dtype=np.float32)
    with_graphs = asking.ask(engine, "again", "layer1", x)
    without = asking.ask(engine, "residual", "layer1", x)
    assert "CUDA" not in caplog.text  # Nor was one tried.
    assert with_graphs.extractor is without.extractor is Extractor.TORCHSCRIPT
    np.testing.assert_array_equal(with_graphs["layer1"], without["layer1"])


def test_a_declared_layer_that_does_not_exist_fails_the_load(engine) -> None:
    """A typo in a declared layer is an error at the start, not at the first request."""
    with pytest.raises(errors.LayerNotFoundError, match="layer1"):
        load(engine, "residual", "layr1")


def test_a_load_that_fails_leaves_nothing_running(engine) -> None:
    """If the declaration is wrong, the model and its thread are freed, and the name is free."""
    before = set(threading.enumerate())
    with pytest.raises(errors.LayerNotFoundError):
        load(engine, "residual", "layr1")
    assert {t for t in threading.enumerate() if t.name == "layertap-promoter"} <= before
    load(engine, "residual", "layer1")


def test_one_pass_serves_a_request_whose_plan_is_known(engine) -> None:
    """A plan is proven once; after that each request takes one forward pass."""
    load(engine, "residual")
    ask(engine, "residual", "layer1", side=20, extractor=Extractor.HOOK)
    counted = passes(engine, "residual")
    for _ in range(3):
        ask(engine, "residual", "layer1", side=20, extractor=Extractor.HOOK)
    assert len(counted) == 3


def test_plans_are_kept_by_last_use_and_declared_ones_for_good(engine) -> None:
    """With room for two plans the least recently used is dropped; declared plans never are."""
    load(engine, "residual", "layer1")
    for side in (20, 24, 28):
        ask(engine, "residual", "layer2", extractor=Extractor.FX, side=side)
    assert ask(engine, "residual", "layer1").extractor is Extractor.TORCHSCRIPT
    counted = passes(engine, "residual")
    ask(engine, "residual", "layer2", extractor=Extractor.FX, side=28)
    assert not counted, "the plan used last is still there"
    ask(engine, "residual", "layer2", extractor=Extractor.FX, side=20)
    assert len(counted) > 2, "the plan used longest ago was proven anew"


def test_a_refused_plan_is_remembered(engine) -> None:
    """The second such request is refused without running the model again."""
    load(engine, "tokens")
    first_texts = []
    counted = passes(engine, "tokens")
    for _ in range(3):
        with pytest.raises(errors.InvalidInputError) as refusal:
            ask(engine, "tokens", "encoder", side=2)
        first_texts.append((str(refusal.value), len(counted)))
    assert len(set(first_texts)) == 1


def test_two_models_of_one_name_are_refused(engine) -> None:
    """A name that is already used is an error that says what to do."""
    load(engine, "residual")
    with pytest.raises(errors.ConfigError, match="'residual'"):
        load(engine, "residual")


def test_close_lets_go_of_the_model(engine) -> None:
    """After close nothing refers to the module any more, and its hooks are removed."""
    load(engine, "residual", "layer1")
    module = engine.host("residual").model.module
    ask(engine, "residual", "layer2")
    assert module.layer2._forward_hooks
    engine.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    with pytest.raises(errors.ModelNotFoundError):
        engine.host("residual")


def test_captured_tensors_do_not_outlive_the_request(engine) -> None:
    """The tensors of a reply are freed with it: after fifty requests none is left."""
    load(engine, "residual", "layer1")

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    for extractor in (Extractor.HOOK, Extractor.TORCHSCRIPT, Extractor.FX, Extractor.CHILDREN):
        ask(engine, "residual", "layer1", extractor=extractor)
        before = tensors()
        for _ in range(50):
            ask(engine, "residual", "layer1", extractor=extractor)
        assert tensors() <= before


def test_inputs_by_an_extractor_that_takes_outputs_are_refused(engine) -> None:
    """FX does not serve inputs; the error says which extractors do."""
    load(engine, "residual")
    with pytest.raises(errors.ExtractorUnsupportedError, match="TORCHSCRIPT, EXPORT, HOOK"):
        ask(engine, "residual", "layer1:input", extractor=Extractor.FX)


def test_a_model_that_keeps_state_runs_one_pass_at_a_time() -> None:
    """Passes of a module that writes attributes could affect each other, so they take turns."""
    engine = Engine(threads=1, instances=2, plan_cache=kept())
    load(engine, "keeps_state")
    host = engine.host("keeps_state")
    assert not host.catalogue.scope.rules.concurrent
    module = host.model.module
    inputs = [np.full((1, *ITEM), value, np.float32) for value in range(8)]
    truth = [outputs_of(module, torch.from_numpy(x), "tail")[0] for x in inputs]

    def served(x: np.ndarray) -> torch.Tensor:
        return asking.ask(engine, "keeps_state", "tail", x, Extractor.HOOK).torch()["tail"]

    def naive(x: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():
            return module(torch.from_numpy(x))

    with ThreadPoolExecutor(8) as pool:
        assert all(map(torch.equal, pool.map(served, inputs * 4), truth * 4))
        assert not all(map(torch.equal, pool.map(naive, inputs * 4), truth * 4))
    engine.close()


def test_each_device_has_compute_threads_of_its_own(engine) -> None:
    """A model on another device runs concurrently, and gives the same answers."""
    load(engine, "residual")
    engine.load(ModelSpec("tinynets:residual", "other", item_shape=ITEM), device="cpu:0")
    hosts = engine.hosts()
    assert hosts[0].compute is not hosts[1].compute
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        assert go.wait(60)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hosts[0].compute.run, hold, Call())
        assert held.wait(60)
        beside = ask(engine, "other", "layer1", extractor=Extractor.HOOK)["layer1"]
        go.set()
    truth = ask(engine, "residual", "layer1", extractor=Extractor.HOOK)["layer1"]
    assert np.array_equal(beside, truth)
    engine.unload("other")


def test_compiled_plans_are_bounded_by_the_memory_of_their_weights() -> None:
    """Each holds the model's weights again: with room for two, the third replaces the oldest."""
    weights = sum(p.nbytes for p in residual().state_dict().values())
    engine = Engine(Limits(plan_bytes=int(2.5 * weights)), plan_cache=kept())
    load(engine, "residual")
    host = engine.host("residual")
    for layer in ("conv1", "layer1", "layer2", "conv1"):
        ask(engine, "residual", layer, extractor=Extractor.TORCHSCRIPT)
        assert len(host.plans._built) <= 2
    engine.close()


def test_a_model_over_the_budget_is_not_compiled_beside_requests() -> None:
    """There is no memory for a copy of its weights: AUTO uses HOOK; a named TORCHSCRIPT works."""
    engine = Engine(Limits(plan_bytes=1), plan_cache=kept())
    load(engine, "residual")
    for _ in range(2 * PROMOTE_AFTER):
        assert ask(engine, "residual", "layer1").extractor is Extractor.HOOK
    for layer in ("layer1", "layer2"):
        assert ask(engine, "residual", layer, extractor=Extractor.TORCHSCRIPT)
    assert ask(engine, "residual", "layer1").extractor is Extractor.HOOK
    engine.close()


def test_most_models_keep_no_state(engine) -> None:
    """Models without state are not restricted."""
    load(engine, "residual")
    assert engine.host("residual").catalogue.scope.rules == PassRules()


def test_plans_of_a_model_that_keeps_state_are_built_in_its_turn() -> None:
    """The passes that prove a new plan would affect those of requests, so they take turns."""
    engine = Engine(threads=1, instances=2, plan_cache=kept())
    load(engine, "keeps_state")
    module = tinynets.keeps_state()
    x = np.full((1, *ITEM), 8, np.float32)
    with torch.inference_mode():
        truth = outputs_of(module, torch.from_numpy(x), "tail")[0]

    def ask_for(x: np.ndarray) -> torch.Tensor:
        return asking.ask(engine, "keeps_state", "tail", x, Extractor.HOOK).torch()["tail"]

    others = [np.zeros((1, 3, size, size), np.float32) for size in range(17, 57)]
    with ThreadPoolExecutor(2) as pool:
        built = pool.submit(lambda: [ask_for(other) for other in others])
        answers = []
        while not built.done():
            answers.append(ask_for(x))
        built.result()
    assert all(torch.equal(answer, truth) for answer in answers)
    engine.close()
