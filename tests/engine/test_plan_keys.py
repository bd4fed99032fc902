"""A plan serves the item shape and type that it was made for, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from asking import ask
from layertap import Extractor, LayerSelection, errors
from layertap.engine import Engine
from layertap.extraction.verify import TORCHSCRIPT_TOLERANCE, difference
from layertap.models import ModelSpec
from oracle import outputs_of
from tinynets import ITEM


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine without models."""
    engine = Engine()
    yield engine
    engine.close()


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated; the trace is the naive way.
def test_swin_at_another_size_gets_a_plan_of_its_own(engine) -> None:
    """A trace of Swin is silently wrong at another height and width; ours is right at both."""
    layer = "features.3"
    engine.load(ModelSpec("swin_t", weights="random", item_shape=(3, 64, 64)), [
        LayerSelection(layer),
    ])  # fmt: skip
    module = engine.host("swin_t").model.module
    naive = torch.jit.trace(module, torch.rand(1, 3, 64, 64), check_trace=False)
    for size in ((64, 64), (128, 128), (64, 64), (80, 112)):
        for batch in (1, 3, 2):
            x = torch.rand(batch, 3, *size)
            truth = outputs_of(module, x, layer)[0]
            features = ask(engine, "swin_t", layer, x, Extractor.TORCHSCRIPT)
            assert features.extractor is Extractor.TORCHSCRIPT
            error = difference(features.torch()[layer], truth)
            assert error <= TORCHSCRIPT_TOLERANCE[torch.float32], (size, batch)
    x = torch.rand(1, 3, 128, 128)
    assert difference(naive(x), module(x)) > 1e-2


def test_a_dtype_has_plans_of_its_own(engine) -> None:
    """One net in float32 and in float64: each is served in its own type and refuses the other's."""
    for net in ("residual", "double"):
        engine.load(ModelSpec(f"tinynets:{net}", item_shape=ITEM), [LayerSelection("layer1")])
    x = torch.rand(2, *ITEM, dtype=torch.float64)
    for net, dtype in (("residual", torch.float32), ("double", torch.float64)):
        features = ask(engine, net, "layer1", x.to(dtype), Extractor.AUTO)
        assert features.extractor is Extractor.TORCHSCRIPT
        truth = outputs_of(engine.host(net).model.module, x.to(dtype), "layer1")[0]
        assert difference(features.torch()["layer1"], truth) <= TORCHSCRIPT_TOLERANCE[dtype]
    with pytest.raises(errors.InvalidInputError, match="got dtype float32, expected float64"):
        ask(engine, "double", "layer1", x.float(), Extractor.AUTO)


def test_a_set_has_a_plan_of_its_own(engine) -> None:
    """One layer alone and beside another, output and input, are four plans and no mixture."""
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
