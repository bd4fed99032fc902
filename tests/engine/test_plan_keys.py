"""A plan serves only the item shape, dtype and batch sizes for which it was proven."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import oddnets
from asking import ask
from kept import kept
from layertap import Extractor, LayerSelection, errors
from layertap.engine import Engine
from layertap.extraction.verify import COMPILED_TOLERANCE, difference
from layertap.models import ModelSpec
from oracle import outputs_of
from tinynets import ITEM


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine without models."""
    engine = Engine(plan_cache=kept())
    yield engine
    engine.close()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated; the trace is the naive way.
def test_swin_at_another_size_gets_a_plan_of_its_own(engine) -> None:
    """A trace of Swin is silently wrong at another height and width; layertap is right at both."""
    layer = "features.3"
    engine.load(ModelSpec("layoutnets:small_swin", item_shape=(3, 64, 64)), [
        LayerSelection(layer),
    ])  # fmt: skip
    module = engine.host("small_swin").model.module
    naive = torch.jit.trace(module, torch.rand(1, 3, 64, 64), check_trace=False)
    for size in ((64, 64), (128, 128), (64, 64), (80, 112)):
        for batch in (1, 3, 2):
            x = torch.rand(batch, 3, *size)
            truth = outputs_of(module, x, layer)[0]
            features = ask(engine, "small_swin", layer, x, Extractor.TORCHSCRIPT)
            assert features.extractor is Extractor.TORCHSCRIPT
            error = difference(features.torch()[layer], truth)
            assert error <= COMPILED_TOLERANCE[torch.float32], (size, batch)
    x = torch.rand(1, 3, 128, 128)
    assert difference(naive(x), module(x)) > 1e-2


def test_a_dtype_has_plans_of_its_own(engine) -> None:
    """One net in float32 and in float64: each is served in its own dtype and refuses the other."""
    for net in ("residual", "double"):
        engine.load(ModelSpec(f"tinynets:{net}", item_shape=ITEM), [LayerSelection("layer1")])
    x = torch.rand(2, *ITEM, dtype=torch.float64)
    for net, dtype in (("residual", torch.float32), ("double", torch.float64)):
        features = ask(engine, net, "layer1", x.to(dtype), Extractor.AUTO)
        assert features.extractor is Extractor.TORCHSCRIPT
        truth = outputs_of(engine.host(net).model.module, x.to(dtype), "layer1")[0]
        assert difference(features.torch()["layer1"], truth) <= COMPILED_TOLERANCE[dtype]
    with pytest.raises(errors.InvalidInputError, match="got dtype float32, expected float64"):
        ask(engine, "double", "layer1", x.float(), Extractor.AUTO)


def test_a_set_has_a_plan_of_its_own(engine) -> None:
    """One layer alone and with another, output and input, use four plans, which don't mix."""
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    module = engine.host("residual").model.module
    x = torch.rand(2, *ITEM)
    for layers in (["bn1"], ["bn1", "layer1"], ["bn1:input"], ["bn1:input", "bn1"]):
        features = ask(engine, "residual", layers, x, Extractor.TORCHSCRIPT)
        assert list(features) == layers
        for name in layers:
            source = "conv1" if name == "bn1:input" else name
            truth = outputs_of(module, x, source)[0]
            assert difference(features.torch()[name], truth) <= 1e-4
        assert all(isinstance(value, np.ndarray) for value in features.values())


@pytest.mark.parametrize("net", ["in_pieces", "large_batches"])
def test_a_batch_size_that_a_program_has_not_learnt_is_served_by_hook(engine, net) -> None:
    """Code that depends on the batch size is right at each size, as AUTO chooses by size."""
    engine.load(ModelSpec(f"oddnets:{net}", item_shape=ITEM), [LayerSelection("tail")])
    module = engine.host(net).model.module
    hook, compiled = Extractor.HOOK, Extractor.TORCHSCRIPT
    for size, extractor in ((2, compiled), (6, hook), (4, compiled), (9, hook), (6, hook)):
        x = torch.rand(size, *ITEM)
        features = ask(engine, net, "tail", x)
        truth = outputs_of(module, x, "tail")[0]
        assert difference(features.torch()["tail"], truth) <= COMPILED_TOLERANCE[torch.float32]
        assert features.extractor is extractor, size


def test_a_batch_size_that_the_chosen_extractor_can_not_serve_is_refused(engine) -> None:
    """A request that names the extractor is refused at that size; other sizes are served."""
    engine.load(ModelSpec("oddnets:large_batches", item_shape=ITEM))
    for _ in range(2):
        with pytest.raises(errors.ExtractorUnsupportedError, match="at batch size 6: .*HOOK can"):
            ask(engine, "large_batches", "tail", torch.rand(6, *ITEM), Extractor.TORCHSCRIPT)
    features = ask(engine, "large_batches", "tail", torch.rand(3, *ITEM), Extractor.TORCHSCRIPT)
    assert features.extractor is Extractor.TORCHSCRIPT


def test_a_batch_that_the_model_itself_fails_on_is_the_models_error(engine) -> None:
    """AUTO runs the model itself, even if its program has lost the model's check."""
    engine.load(ModelSpec("oddnets:few_items", item_shape=ITEM), [LayerSelection("tail")])
    assert ask(engine, "few_items", "tail", torch.rand(4, *ITEM)).extractor is Extractor.TORCHSCRIPT
    with pytest.raises(errors.ModelRunError, match="ValueError"):
        ask(engine, "few_items", "tail", torch.rand(5, *ITEM))


@pytest.mark.parametrize("extractor", [Extractor.HOOK, Extractor.TORCHSCRIPT])
def test_want_of_memory_is_no_property_of_a_plan(engine, monkeypatch, extractor) -> None:
    """Out of memory is temporary, at a new shape or batch size as at a known one."""
    engine.load(ModelSpec("oddnets:hungry", item_shape=ITEM))
    known, larger, wider = (2, *ITEM), (6, *ITEM), (2, 3, 24, 24)
    ask(engine, "hungry", "tail", torch.rand(known), Extractor.HOOK)
    monkeypatch.setattr(oddnets.Hungry, "wants", 1 << 55)
    for shape in (known, larger, wider):
        with pytest.raises(
            errors.OverloadedError, match="out of memory while running model 'hungry'"
        ):
            ask(engine, "hungry", "tail", torch.rand(shape), extractor)
    monkeypatch.setattr(oddnets.Hungry, "wants", 0)
    for shape in (known, larger, wider):
        assert ask(engine, "hungry", "tail", torch.rand(shape), extractor).extractor is extractor
