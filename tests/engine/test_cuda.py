"""On a GPU the values are those of the model there, and they are whole when they are sent."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import asking
from devices import needs_cuda
from layertap import Extractor, Features, LayerSelection
from layertap.engine import Call, Engine, ExtractionRequest, ImagesInput
from layertap.extraction.verify import TORCHSCRIPT_TOLERANCE, difference
from layertap.models import ModelSpec
from oracle import outputs_of
from tinynets import ITEM

pytestmark = needs_cuda

DEVICE = "cuda"
LAYERS = ("bn1", "layer1", "avgpool")
PHOTO = Path(__file__).parents[2] / "examples" / "images" / "grace_hopper.jpg"


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine on the GPU with one net."""
    engine = Engine(device=DEVICE)
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM), [LayerSelection("layer1")])
    yield engine
    engine.close()


def ask(engine: Engine, x: torch.Tensor, extractor: Extractor) -> dict[str, torch.Tensor]:
    return asking.ask(engine, "residual", LAYERS, x, extractor).torch()


def truth(engine: Engine, x: torch.Tensor, layer: str) -> torch.Tensor:
    module = engine.host("residual").model.module
    return outputs_of(module, x.to(DEVICE), layer)[0].cpu()


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("extractor", [e for e in Extractor if e is not Extractor.AUTO])
def test_every_extractor_equals_the_oracle(engine, extractor, batch) -> None:
    """What arrives is what the modules returned on the GPU, TORCHSCRIPT within its tolerance."""
    x = torch.rand(batch, *ITEM)
    tolerance = TORCHSCRIPT_TOLERANCE[torch.float32] if extractor is Extractor.TORCHSCRIPT else 0.0
    for layer, value in ask(engine, x, extractor).items():
        assert difference(value, truth(engine, x, layer)) <= tolerance, layer


def test_values_of_many_callers_are_whole(engine) -> None:
    """No reply holds bytes of a copy that was not finished, or of another caller's."""
    inputs = [torch.full((8, *ITEM), i / 16) for i in range(16)]
    expected = [truth(engine, x, "layer1") for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda x: ask(engine, x, Extractor.HOOK), inputs * 4))
    for answer, oracle in zip(answers, expected * 4, strict=True):
        assert torch.equal(answer["layer1"], oracle)


def test_a_declared_layer_is_compiled(engine) -> None:
    """AUTO serves it by TORCHSCRIPT on the GPU too."""
    array = np.zeros((1, *ITEM), np.float32)
    served = asking.ask(engine, "residual", "layer1", array)
    assert served.extractor is Extractor.TORCHSCRIPT


def test_a_photograph_reaches_the_gpu(engine) -> None:
    """Images are preprocessed on the CPU and computed on the GPU."""
    request = ExtractionRequest(
        "residual", ImagesInput((PHOTO.read_bytes(),)), (LayerSelection("conv1"),), Extractor.HOOK
    )
    value = Features(engine.extract(request, Call()).message)["conv1"]
    assert value.shape[0] == 1
    assert np.isfinite(value).all()
