"""Models whose input isn't an image: waveforms, token ids and series of any length."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import asking
import inputnets
from layertap import Extractor, errors
from layertap.engine import Engine, Limits
from layertap.models import ModelSpec
from oracle import outputs_of

PLANS = 3


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine without models that keeps few plans."""
    engine = Engine(Limits(plans=PLANS))
    yield engine
    engine.close()


def inputs(kind: str, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    if kind == "text":
        return torch.randint(0, 50, (2, length), generator=generator)
    shape = (2, length, 6) if kind == "series" else (2, length)
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize(
    ("net", "item_shape", "layer"),
    [("wave", (64,), "second"), ("text", (16,), "norm"), ("series", (10, 6), "head")],
)
@pytest.mark.parametrize("extractor", [Extractor.AUTO, Extractor.HOOK, Extractor.TORCHSCRIPT])
def test_any_length_is_served(engine, net, item_shape, layer, extractor) -> None:
    """Each length gives the values of a fresh model, and only few plans are kept."""
    host = engine.load(ModelSpec(f"inputnets:{net}", item_shape=item_shape))
    fresh = getattr(inputnets, net)()
    for length in (16, 13, 15, 12, 16, 14, 13):
        x = inputs(net, length)
        (right,) = outputs_of(fresh, x, layer)
        got = asking.ask(engine, net, layer, x.numpy(), extractor)[layer]
        np.testing.assert_allclose(got, right.numpy(), rtol=1e-4, atol=1e-5)
    assert len(host._plans) <= PLANS


def test_a_length_that_the_model_refuses_gets_the_models_own_words(engine, caplog) -> None:
    """The caller gets the model's message as an input error; no traceback is logged."""
    engine.load(ModelSpec("inputnets:divisible", item_shape=(3, 16, 16)))
    with pytest.raises(
        errors.InvalidInputError,
        match=r"items of x \[3, 16, 12\] float32: ValueError: the image's size must be "
        r"a multiple of 8, got \[16, 12\]; it was measured at x \[3, 16, 16\]",
    ):
        asking.ask(engine, "divisible", "conv", np.zeros((1, 3, 16, 12), np.float32))
    assert "Traceback" not in caplog.text


def test_layers_of_a_model_that_differentiates(engine) -> None:
    """Values from inside a differentiated part are served without their autograd graph."""
    engine.load(ModelSpec("inputnets:force", item_shape=(5, 3)))
    x = torch.rand(2, 7, 3)
    for layer in ("energy.1", "out"):
        with torch.inference_mode(mode=False), torch.no_grad():
            (right,) = outputs_of(inputnets.force(), x.clone(), layer)
        got = asking.ask(engine, "force", layer, x.numpy(), Extractor.HOOK)[layer]
        np.testing.assert_allclose(got, right.detach().numpy(), rtol=1e-5, atol=1e-6)
