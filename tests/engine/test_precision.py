"""With another precision or memory layout, the values are those of the converted model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import asking
from kept import kept
from layertap import Extractor, Features, LayerSelection, errors
from layertap.engine import Call, Engine, ExtractionRequest, ImageFiles, Inputs
from layertap.extraction.verify import COMPILED_TOLERANCE, difference
from layertap.models import ModelSpec
from layertap.services.native_form import NativeForm
from oracle import outputs_of
from quick import QUICK
from tinynets import ITEM

LAYERS = ("bn1", "layer1")
PRECISIONS = ("", "bfloat16", "float16")
PHOTO = Path(__file__).parents[2] / "examples" / "images" / "grace_hopper.jpg"


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine without models."""
    engine = Engine(plan_cache=kept())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def forms() -> Iterator[Engine]:
    """An engine with the net in every precision and layout, each under a name of its own."""
    engine = Engine(plan_cache=kept())
    for precision, channels_last in product(PRECISIONS, (False, True)):
        engine.load(
            ModelSpec(
                "tinynets:residual",
                f"net{precision}{channels_last}",
                item_shape=ITEM,
                precision=precision,
                channels_last=channels_last,
            )
        )
    yield engine
    engine.close()


def load(engine: Engine, **options: object) -> torch.nn.Module:
    host = engine.load(ModelSpec("tinynets:residual", item_shape=ITEM, **options))
    return host.model.module


def ask(engine: Engine, x: torch.Tensor, extractor: Extractor) -> dict[str, torch.Tensor]:
    return asking.ask(engine, "residual", LAYERS, x, extractor).torch()


@pytest.mark.parametrize("extractor", QUICK)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_values_are_those_of_the_model_in_its_form(
    forms, precision, channels_last, extractor
) -> None:
    """A float32 batch is converted once, and every extractor gives the modules' values."""
    name = f"net{precision}{channels_last}"
    module = forms.host(name).model.module
    dtype = getattr(torch, precision or "float32")
    x = torch.rand(2, *ITEM)
    for layer, value in asking.ask(forms, name, LAYERS, x, extractor).torch().items():
        truth = outputs_of(module, x.to(dtype), layer)[0]
        assert value.dtype is truth.dtype is dtype
        compiled = extractor is Extractor.TORCHSCRIPT
        assert difference(value, truth) <= (COMPILED_TOLERANCE[dtype] if compiled else 0.0)


def test_weights_have_channels_last(engine) -> None:
    """The setting changes the layout of the weights, and no shape."""
    module = load(engine, channels_last=True)
    weight = module.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_other_types_are_still_refused(engine) -> None:
    """A half-precision model accepts its own dtype and float32; the error says so."""
    load(engine, precision="bfloat16")
    with pytest.raises(
        errors.InvalidInputError,
        match="got dtype float64, expected bfloat16, the model's own, or float32",
    ):
        ask(engine, torch.rand(1, *ITEM, dtype=torch.float64), Extractor.HOOK)


def test_photographs_are_converted(engine) -> None:
    """An image is preprocessed in float32 and computed in the model's precision."""
    load(engine, precision="bfloat16")
    request = ExtractionRequest(
        "residual",
        Inputs(images=(ImageFiles((PHOTO.read_bytes(),)),)),
        (LayerSelection("conv1"),),
        Extractor.HOOK,
        form=NativeForm,
    )
    value = Features(engine.extract(request, Call()).payload).torch()["conv1"]
    assert value.dtype is torch.bfloat16
    assert bool(value.isfinite().all())


def test_an_unknown_precision_is_refused() -> None:
    """The message lists the known precisions."""
    with pytest.raises(errors.ConfigError, match="got 'float8', expected float32, float16"):
        ModelSpec("resnet18", precision="float8")


def test_numpy_batches_of_float16_are_taken_as_they_are(engine) -> None:
    """A float16 model takes float16 without a conversion."""
    module = load(engine, precision="float16")
    x = torch.from_numpy(np.random.default_rng(0).random((1, *ITEM)).astype(np.float16))
    value = ask(engine, x, Extractor.HOOK)["layer1"]
    assert torch.equal(value, outputs_of(module, x, "layer1")[0])
