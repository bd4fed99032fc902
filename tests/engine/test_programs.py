"""If a compiled program fails, only its plan is dropped: the model itself still serves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import proofnets
from asking import ask
from kept import kept
from layertap import Extractor, LayerSelection, errors
from layertap.engine import Engine, Limits
from layertap.models import ModelSpec
from oracle import outputs_of
from tinynets import ITEM


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(Limits(), threads=1, plan_cache=kept())
    yield engine
    engine.close()


def test_declared_layers_whose_program_raises_are_served_by_hook(engine, caplog) -> None:
    """The model is loaded, the reason is logged, and the catalogue refuses the program."""
    engine.load(ModelSpec("proofnets:per_item", item_shape=ITEM))
    host = engine.host("per_item")
    host.declare([LayerSelection("out")])
    x = np.random.default_rng(0).random((3, *ITEM), dtype=np.float32)
    features = ask(engine, "per_item", "out", x)
    assert features.extractor is Extractor.HOOK
    expected = outputs_of(proofnets.per_item().eval(), torch.from_numpy(x), "out")[0]
    assert torch.equal(features.torch()["out"], expected)
    reason = "TORCHSCRIPT can't serve the declared layer 'out': a compiled program fails"
    assert reason in caplog.text
    assert "Expected 2 elements" in host.catalogue.entry("out").refusal(Extractor.TORCHSCRIPT)
    for _ in range(2):
        with pytest.raises(errors.ExtractorUnsupportedError, match="a compiled program fails"):
            ask(engine, "per_item", "out", x, Extractor.TORCHSCRIPT)


@pytest.mark.parametrize("extractor", [Extractor.AUTO, Extractor.TORCHSCRIPT])
def test_a_program_that_fails_where_the_model_does_not_gives_way(engine, extractor) -> None:
    """AUTO returns the model's own value; TORCHSCRIPT is refused, and stays refused."""
    engine.load(ModelSpec("proofnets:catches", item_shape=(4,)))
    engine.host("catches").declare([LayerSelection("head")])
    good, bad = np.array([[0, 1, 2, 8]]), np.array([[0, 1, 2, 9]])
    assert ask(engine, "catches", "head", good).extractor is Extractor.TORCHSCRIPT
    expected = outputs_of(proofnets.catches().eval(), torch.from_numpy(bad), "head")[0]
    for ids in (bad, good):
        if extractor is Extractor.TORCHSCRIPT:
            with pytest.raises(errors.ExtractorUnsupportedError, match="the model itself did not"):
                ask(engine, "catches", "head", ids, extractor)
    features = ask(engine, "catches", "head", bad)
    assert features.extractor is Extractor.HOOK
    assert torch.equal(features.torch()["head"], expected)
    assert ask(engine, "catches", "head", good).extractor is Extractor.HOOK


def test_what_the_model_itself_fails_on_costs_no_program(engine) -> None:
    """An id outside the embedding is the caller's error; the plan stays."""
    engine.load(ModelSpec("proofnets:catches", item_shape=(4,)))
    engine.host("catches").declare([LayerSelection("head")])
    with pytest.raises(errors.ModelRunError):
        ask(engine, "catches", "head", np.array([[0, 1, 2, -1]]))
    good = ask(engine, "catches", "head", np.array([[0, 1, 2, 8]]))
    assert good.extractor is Extractor.TORCHSCRIPT


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_input_that_is_not_finite_never_meets_a_program(engine, bad) -> None:
    """Fused kernels turn NaN into zeros, so AUTO uses the model itself, and TORCHSCRIPT refuses."""
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    engine.host("residual").declare([LayerSelection("layer1")])
    x = np.random.default_rng(0).random((1, *ITEM), dtype=np.float32)
    assert ask(engine, "residual", "layer1", x).extractor is Extractor.TORCHSCRIPT
    x[0, 0, 3, 3] = bad
    features = ask(engine, "residual", "layer1", x)
    net = engine.host("residual").model.module
    expected = outputs_of(net, torch.from_numpy(x), "layer1")[0]
    assert features.extractor is Extractor.HOOK
    np.testing.assert_array_equal(features["layer1"], expected.numpy())
    with pytest.raises(errors.ExtractorUnsupportedError, match="NaN or infinity"):
        ask(engine, "residual", "layer1", x, Extractor.TORCHSCRIPT)
