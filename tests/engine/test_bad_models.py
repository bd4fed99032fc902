"""Models that a server can't use are reported in layertap's own words."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

import asking
from kept import kept
from layertap import Extractor, Features, errors
from layertap.batching import BatchPolicy
from layertap.engine import Engine, HostOptions
from layertap.models import ModelSpec
from layertap.selection import LayerSelection
from tinynets import ITEM


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine without models."""
    engine = Engine(plan_cache=kept())
    yield engine
    engine.close()


def ask(engine: Engine, net: str, layer: str, extractor: Extractor = Extractor.AUTO) -> Features:
    x = np.random.default_rng(0).random((2, *ITEM), dtype=np.float32)
    return asking.ask(engine, net, layer, x, extractor)


def spec(net: str) -> ModelSpec:
    return ModelSpec(f"tinynets:{net}", item_shape=ITEM)


def test_a_model_that_needs_two_inputs(engine) -> None:
    """A request that has one of them is refused, with the names of both."""
    engine.load(spec("two_inputs"))
    with pytest.raises(errors.InvalidInputError, match=r"\bmask\b"):
        ask(engine, "two_inputs", "output")


def test_a_model_that_returns_no_tensor(engine) -> None:
    """Its layers are served; a layer that returns a text is reported as having no tensor."""
    engine.load(spec("returns_text"))
    assert ask(engine, "returns_text", "conv")["conv"].shape == (2, 4, 16, 16)
    with pytest.raises(errors.ExtractorUnsupportedError, match="does not return a plain tensor"):
        ask(engine, "returns_text", "label")


def test_nan_is_told_when_a_model_is_loaded(engine, caplog) -> None:
    """The log names the innermost layer that returned NaN."""
    host = engine.load(spec("not_finite"))
    assert host.catalogue.non_finite == "inner.0"
    assert "layer 'inner.0' returns NaN or infinity" in caplog.text


@pytest.mark.parametrize("extractor", [Extractor.HOOK, Extractor.FX, Extractor.TORCHSCRIPT])
def test_nan_is_a_value_and_is_sent_as_it_is(engine, extractor) -> None:
    """The module's values arrive unchanged, including NaN, and never make a plan fail."""
    engine.load(spec("not_finite"))
    values = ask(engine, "not_finite", "tail", extractor)["tail"]
    assert np.isnan(values).all()


@pytest.mark.parametrize("extractor", [Extractor.HOOK, Extractor.FX, Extractor.TORCHSCRIPT])
def test_nan_is_an_error_where_finite_values_are_required(engine, extractor) -> None:
    """The message names the layer and how much of it is not finite; finite layers are served."""
    engine.load(spec("not_finite"), options=HostOptions(require_finite=True))
    elements = 2 * 4 * math.prod(ITEM[1:])
    with pytest.raises(
        errors.ModelRunError,
        match=f"layer 'tail' of model 'not_finite' holds NaN .* {elements} of {elements} elements",
    ):
        ask(engine, "not_finite", "tail", extractor)
    assert np.isfinite(ask(engine, "not_finite", "conv", extractor)["conv"]).all()


def test_a_model_that_raises(engine) -> None:
    """The caller learns the class of the failure, never the model's text; others are served."""
    engine.load(spec("raises"))
    x = np.full((1, *ITEM), 1e6, np.float32)
    with pytest.raises(errors.ModelRunError, match=r"failed on this input \(RuntimeError\)$"):
        asking.ask(engine, "raises", "head", x)
    assert ask(engine, "raises", "head")["head"].shape[0] == 2


def test_a_declared_layer_that_runs_for_some_inputs_only(engine) -> None:
    """The model is served, and requests do not share passes, because one would fail the others."""
    item = (3, 8, 8)
    source = ModelSpec("zoo.results:SometimesTuple.build", name="net", item_shape=item)
    options = HostOptions(batching=BatchPolicy(max_size=8, max_delay=0.02))
    layers = [LayerSelection(name) for name in ("first", "maybe.0")]
    engine.load(source, layers, options=options)
    x = np.random.default_rng(0).random((2, *item), dtype=np.float32)
    features = asking.ask(engine, "net", "first", x, Extractor.HOOK)
    assert features["first"].shape[0] == 2
