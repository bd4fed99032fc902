"""On a GPU the values are those of the model there, and copies are complete when sent."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

import asking
from devices import needs_cuda
from layertap import Extractor, Features, LayerSelection, Projection
from layertap.engine import Call, Engine, ExtractionRequest, HostOptions, ImageFiles, Inputs
from layertap.extraction.tf32 import allow_tf32
from layertap.extraction.verify import COMPILED_TOLERANCE, TF32_TOLERANCE, difference
from layertap.models import ModelSpec
from layertap.services.native_form import NativeForm
from oracle import outputs_of
from quick import QUICK
from tinynets import ITEM

pytestmark = needs_cuda

DEVICE = "cuda"
LAYERS = ("bn1", "layer1", "avgpool")
PHOTO = Path(__file__).parents[2] / "examples" / "images" / "grace_hopper.jpg"


@pytest.fixture(autouse=True)
def _ieee_float32() -> Iterator[None]:
    """Compute float32 as the server does, and restore PyTorch's defaults."""
    allow_tf32(False)
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine on the GPU with one net."""
    engine = Engine(device=DEVICE)
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM), [LayerSelection("layer1")])
    yield engine
    engine.close()


def ask(engine: Engine, x: torch.Tensor, extractor: Extractor) -> dict[str, torch.Tensor]:
    return asking.ask(engine, "residual", LAYERS, x, extractor).torch()


def test_grids_and_projections(engine: Engine) -> None:
    """They are computed on the GPU from the values there, each at its moment."""
    x = torch.rand(3, *ITEM)
    matrix = np.random.default_rng(0).random((4, 24), np.float32)
    projection = Projection(matrix, matrix[0])
    layers = [
        "bn1+layer1:around=3",
        LayerSelection("layer1", concat=("layer2",), projection=projection),
    ]
    for _ in range(3):
        found = asking.ask(engine, "residual", layers, x, Extractor.HOOK)
        near = [avg_pool2d(truth(engine, x, each), 3, 1, 1) for each in ("bn1", "layer1")]
        near[1] = interpolate(near[1], near[0].shape[2:], mode="bilinear", align_corners=False)
        np.testing.assert_allclose(found["bn1+layer1"], torch.cat(near, 1).numpy(), atol=1e-5)
        one, two = (truth(engine, x, each) for each in ("layer1", "layer2"))
        two = interpolate(two, one.shape[2:], mode="bilinear", align_corners=False)
        places = torch.cat([one, two], 1).movedim(1, -1).double() - torch.from_numpy(matrix[0])
        product = (places @ torch.from_numpy(matrix).double().T).movedim(-1, 1)
        np.testing.assert_allclose(found["layer1+layer2"], product.numpy(), atol=1e-4)


def truth(engine: Engine, x: torch.Tensor, layer: str) -> torch.Tensor:
    module = engine.host("residual").model.module
    return outputs_of(module, x.to(DEVICE), layer)[0].cpu()


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("extractor", QUICK)
def test_every_extractor_equals_the_reference(engine, extractor, batch) -> None:
    """The values are those of the modules on the GPU, for TORCHSCRIPT within its tolerance."""
    x = torch.rand(batch, *ITEM)
    tolerance = COMPILED_TOLERANCE[torch.float32] if extractor is Extractor.TORCHSCRIPT else 0.0
    for layer, value in ask(engine, x, extractor).items():
        assert difference(value, truth(engine, x, layer)) <= tolerance, layer


def test_values_of_many_callers_are_whole(engine) -> None:
    """No reply holds bytes of an unfinished copy, or of another caller's."""
    inputs = [torch.full((8, *ITEM), i / 16) for i in range(16)]
    expected = [truth(engine, x, "layer1") for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda x: ask(engine, x, Extractor.HOOK), inputs * 4))
    for answer, reference in zip(answers, expected * 4, strict=True):
        assert torch.equal(answer["layer1"], reference)


def test_float32_is_as_exact_as_on_the_cpu(engine) -> None:
    """Without TF32 a GPU's values equal the CPU's up to float32's rounding."""
    x = torch.rand(4, *ITEM)
    module = copy.deepcopy(engine.host("residual").model.module).cpu()
    for layer, value in ask(engine, x, Extractor.HOOK).items():
        assert difference(value, outputs_of(module, x, layer)[0]) <= 1e-5, layer


def test_tf32_is_served_compiled_too(engine) -> None:
    """With TF32, compiled plans are proven within its tolerance, and serve."""
    allow_tf32(True)
    engine.load(ModelSpec("resnet18", "tf32", weights="random"), [LayerSelection("avgpool")])
    x = torch.rand(2, 3, 224, 224)
    exact, compiled = (
        asking.ask(engine, "tf32", "avgpool", x, extractor).torch()["avgpool"]
        for extractor in (Extractor.HOOK, Extractor.TORCHSCRIPT)
    )
    assert difference(compiled, exact) <= TF32_TOLERANCE


def test_a_declared_layer_is_compiled(engine) -> None:
    """AUTO serves it with TORCHSCRIPT on the GPU too."""
    array = np.zeros((1, *ITEM), np.float32)
    served = asking.ask(engine, "residual", "layer1", array)
    assert served.extractor is Extractor.TORCHSCRIPT


def test_a_photograph_reaches_the_gpu(engine) -> None:
    """Images are preprocessed on the CPU and computed on the GPU."""
    request = ExtractionRequest(
        "residual",
        Inputs(images=(ImageFiles((PHOTO.read_bytes(),)),)),
        (LayerSelection("conv1"),),
        Extractor.HOOK,
        form=NativeForm,
    )
    value = Features(engine.extract(request, Call()).payload)["conv1"]
    assert value.shape[0] == 1
    assert np.isfinite(value).all()


def test_a_value_is_sent_as_it_was_when_it_was_captured(engine) -> None:
    """A later in-place operation on a busy device does not change the value."""
    engine.load(ModelSpec("tinynets:residual", "busy", item_shape=ITEM))
    x = torch.rand(64, *ITEM)
    expected = {layer: truth(engine, x, layer) for layer in LAYERS}
    for _ in range(20):
        torch.cuda._sleep(20_000_000)
        answer = asking.ask(engine, "busy", LAYERS, x, Extractor.HOOK).torch()
        for layer in LAYERS:
            assert torch.equal(answer[layer], expected[layer]), layer


def graphed(engine: Engine, net: str, layer: str, *sizes: int) -> None:
    """Load a net with a layer that CUDA graphs serve at some batch sizes."""
    spec = ModelSpec(f"tinynets:{net}", "graphed", item_shape=ITEM)
    engine.load(spec, [LayerSelection(layer)], options=HostOptions(cuda_graphs=sizes))


def test_graphs_serve_their_batch_sizes_and_no_other(engine, caplog) -> None:
    """Each caller gets the values of its own input, at recorded sizes and at others."""
    caplog.set_level("INFO", "layertap")
    graphed(engine, "residual", "layer1", 1, 8)
    assert "CUDA graphs of layer1 at batch sizes [1, 8]" in caplog.text
    inputs = [torch.rand(size, *ITEM) for size in (1, 8, 3, 1, 8, 8, 1)]
    expected = [truth(engine, x, "layer1") for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda x: asking.ask(engine, "graphed", "layer1", x), inputs * 4))
    for answer, reference in zip(answers, expected * 4, strict=True):
        assert answer.extractor is Extractor.TORCHSCRIPT
        tolerance = COMPILED_TOLERANCE[torch.float32]
        assert difference(answer.torch()["layer1"], reference) <= tolerance


def test_a_model_that_looks_at_values_is_served_without_a_graph(engine, caplog) -> None:
    """A recording would take one branch for every input, so it is refused and logged."""
    graphed(engine, "branching", "second", 1)
    assert "no CUDA graph of 'second' at batch size 1" in caplog.text
    module = engine.host("graphed").model.module
    for x in (torch.rand(1, *ITEM), -torch.rand(1, *ITEM)):
        answer = asking.ask(engine, "graphed", "second", x).torch()["second"]
        assert torch.equal(answer, outputs_of(module, x.to(DEVICE), "second")[0].cpu())


def test_loading_tries_nothing_on_the_gpu_that_could_break_it(engine) -> None:
    """Ids and lengths are tried on the CPU: one out of range would end all use of the GPU."""
    engine.load(ModelSpec("lookupnets:TwoTables", "tables", item_shape=(8,)))
    (spec,) = engine.host("tables").model.signature.inputs
    assert spec.dtype is torch.int64
    assert spec.values.rows == 30
    ids = torch.randint(0, 30, (2, 8))
    value = asking.ask(engine, "tables", "kinds", ids, Extractor.HOOK).torch()["kinds"]
    table = engine.host("tables").model.module.kinds.weight.cpu()
    assert torch.equal(value, table[ids])
    assert engine.alive


LOST = """
import sys
import numpy as np
import asking
from layertap import errors
from layertap.engine import Engine
from layertap.models import ModelSpec
from tinynets import ITEM

engine = Engine(device="cuda")
try:
    engine.load(ModelSpec("lookupnets:Rounds", "rounds", item_shape=(3,), input_dtype="float32"))
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    image = np.zeros((1, *ITEM), np.float32)
    asking.ask(engine, "residual", "layer1", image)
    assert engine.alive
    try:
        asking.ask(engine, "rounds", "last", np.full((1, 3), 1000, np.float32))
        sys.exit("no error")
    except errors.ModelRunError as error:
        print("first:", error)
    for _ in range(3):
        try:
            asking.ask(engine, "residual", "layer1", image)
            sys.exit("served")
        except (errors.ModelRunError, errors.UnavailableError) as error:
            print("then:", type(error).__name__, error)
    assert isinstance(error, errors.UnavailableError)
    assert not engine.alive
finally:
    engine.close()
print("closed")
"""


def test_a_lost_gpu_is_said_and_the_engine_is_not_alive() -> None:
    """After a failed assertion on the device requests are refused with what to do, at once."""
    folders = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOST],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "then: UnavailableError device cuda:0 can't be used any more" in done.stdout
    assert done.stdout.endswith("closed\n")
