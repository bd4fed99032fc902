"""A model in this process gives the values of its modules and of a server."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from PIL import Image

import hardnets
import inputnets
import layertap
import statefulnets
import tinynets
from kept import kept
from layertap import (
    Capture,
    Client,
    Extractor,
    LayerSelection,
    Limits,
    LocalModel,
    Reduction,
    errors,
)
from layertap.engine import Engine
from layertap.local import model as local_model
from layertap.models import ModelSpec
from oracle import inputs_of, outputs_of
from quick import QUICK
from serving import running_server
from tinynets import ITEM

PHOTO = Path(__file__).resolve().parents[2] / "examples" / "images" / "grace_hopper.jpg"
EXTRACTORS = [each for each in Extractor if each is not Extractor.AUTO]


def load(net: str = "tinynets:residual", **settings: object) -> LocalModel:
    return layertap.load(net, item_shape=ITEM, device="cpu", **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> Iterator[LocalModel]:
    """The residual net, for tests that don't change it."""
    with load() as loaded:
        yield loaded


@pytest.fixture(scope="module")
def spectrum() -> Iterator[LocalModel]:
    """A net with complex values between two layers."""
    with load("hardnets:spectrum") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """A client of a server with the same net."""
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    with running_server(engine) as address, Client(address) as connected:
        yield connected
    engine.close()


def batch(size: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(size, *ITEM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("extractor", QUICK)
def test_each_extractor_gives_what_a_hook_sees(model: LocalModel, extractor: Extractor) -> None:
    """Bit for bit those of a fresh module; a compiled program within its tolerance."""
    x = batch()
    features = model.extract(x, ["conv1", "layer1", "avgpool"], extractor=extractor)
    assert (list(features), features.extractor) == (["conv1", "layer1", "avgpool"], extractor)
    for name, value in features.items():
        (true,) = outputs_of(tinynets.residual(), x, name)
        if extractor is Extractor.TORCHSCRIPT:
            torch.testing.assert_close(value, true, rtol=0, atol=1e-4 * float(true.abs().max()))
        else:
            assert torch.equal(value, true)


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("layer1", ["layer1"]),
        (LayerSelection("layer1", alias="deep"), ["deep"]),
        (["conv1", "avgpool:input"], ["conv1", "avgpool:input"]),
        (["avgpool:input=before", LayerSelection("fc", Capture.INPUT)], ["before", "fc:input"]),
        ({"layer1": "a", "layer2": "b"}, ["a", "b"]),
        ("layer?", ["layer1", "layer2"]),
        ("layer1.*.conv1", ["layer1.0.conv1", "layer1.1.conv1"]),
    ],
)
def test_each_way_to_select(model: LocalModel, layers: object, names: list[str]) -> None:
    """Names, sides, aliases, globs, lists and mappings have the same meaning as on a server."""
    features = model.extract(batch(), layers, extractor="hook")  # type: ignore[arg-type]
    assert list(features) == names


def test_an_input_is_what_the_module_was_given(model: LocalModel) -> None:
    """``:input`` is the value that a pre-hook on a fresh module sees."""
    x = batch()
    value = model.extract(x, "avgpool:input", extractor="hook")["avgpool:input"]
    assert torch.equal(value, inputs_of(tinynets.residual(), x, "avgpool")[0])


@pytest.mark.parametrize("dtype", ["", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("reduction", list(Reduction)[:3])
def test_a_server_gives_the_same_bits(
    model: LocalModel, client: Client, reduction: Reduction, dtype: str
) -> None:
    """This holds for every reduction and dtype."""
    layers = [LayerSelection("layer1", reduction=reduction, dtype=dtype)]
    x = batch()
    here = model.extract(x, layers, extractor="hook")
    there = client.extract("residual", x, layers, extractor="hook")
    assert here.extractor is there.extractor
    assert here["layer1"].dtype == there.torch()["layer1"].dtype
    assert torch.equal(here["layer1"], there.torch()["layer1"])
    np.testing.assert_array_equal(here.numpy()["layer1"], there["layer1"])


@pytest.mark.parametrize("given", ["path", "bytes", "pil", "list"])
def test_images_are_preprocessed_as_by_a_server(
    model: LocalModel, client: Client, given: str
) -> None:
    """This holds for paths, bytes, PIL images and lists of them."""
    with Image.open(PHOTO) as opened:
        images: object = {
            "path": PHOTO,
            "bytes": PHOTO.read_bytes(),
            "pil": opened.copy(),
            "list": [str(PHOTO), PHOTO.read_bytes()],
        }[given]
    here = model.extract(images, "conv1", extractor="hook")  # type: ignore[arg-type]
    there = client.extract("residual", images, "conv1", extractor="hook")  # type: ignore[arg-type]
    assert torch.equal(here["conv1"], there.torch()["conv1"])


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.numpy(),
        lambda x: {"x": x},
        lambda x: {"x": x.numpy()},
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.flip(0).flip(0),
        lambda x: np.asfortranarray(x.numpy()),
        lambda x: x.numpy().astype(">f4"),
        lambda x: torch.nn.Parameter(x.clone()),
    ],
)
def test_each_kind_of_batch(model: LocalModel, change: object) -> None:
    """Arrays and tensors of any strides and byte order, alone or by the input's name."""
    x = batch()
    with torch.inference_mode(False):
        value = model.extract(change(x.clone()), "conv1", extractor="hook")["conv1"]  # type: ignore[operator]
    assert torch.equal(value, outputs_of(tinynets.residual(), x, "conv1")[0])


def test_read_only_memory_is_copied(tmp_path: Path) -> None:
    """A model that writes into its input neither ends the process nor changes the caller's file."""
    x = batch().numpy()
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    with load("tinynets:writes_input") as model:
        first = next(iter(model.layers))
        model.extract(mapped, first, extractor="hook")
        mine = torch.from_numpy(x.copy())
        model.extract(mine, first, extractor="hook")
    np.testing.assert_array_equal(mapped, x)
    np.testing.assert_array_equal(mine.numpy(), x)
    # Nor would a model that was never seen to write.
    (view,) = local_model.inputs_of(mapped).tensors
    assert not view.data.readonly
    assert not np.shares_memory(view.array(), mapped)


def test_the_tensors_are_the_callers_own(model: LocalModel) -> None:
    """Writing to one changes neither the model, nor the batch, nor the next result."""
    x = batch()
    before = x.clone()
    for _ in range(2):
        features = model.extract(x, ["conv1", "conv1:input", "layer1"], extractor="hook")
        for name, value in features.items():
            assert value.is_contiguous()
            assert not value.is_inference()
            net, path = tinynets.residual(), name.removesuffix(":input")
            true = (inputs_of if name != path else outputs_of)(net, before, path)[0]
            assert torch.equal(value, true)
            value.fill_(math.nan)
    assert torch.equal(x, before)


def test_values_can_be_trained_on(model: LocalModel) -> None:
    """Autograd accepts them as constants, unlike tensors made in inference mode."""
    x = batch()
    with torch.inference_mode(False), torch.enable_grad():
        value = model.extract(x.clone(), "avgpool", extractor="hook")["avgpool"]
        probe = torch.nn.Linear(16, 1)
        probe(value.flatten(1)).sum().backward()
    assert torch.allclose(probe.weight.grad[0], value.flatten(1).sum(0))


def test_other_element_types() -> None:
    """Integer input works, and so does bfloat16 output of a bfloat16 model."""
    with layertap.load("inputnets:text", item_shape=[8], device="cpu") as model:
        ids = torch.arange(16).reshape(2, 8)
        name = next(layer.name for layer in model.layers.values() if layer.extractors())
        value = model.extract(ids, name, extractor="hook")[name]
        assert torch.equal(value, outputs_of(inputnets.text(), ids, name)[0])
    with load(precision="bfloat16") as model:
        features = model.extract(batch(), "conv1", extractor="hook")
        assert features["conv1"].dtype is torch.bfloat16
        array = features.numpy()["conv1"]
        assert array.dtype == ml_dtypes.bfloat16
        assert torch.equal(torch.from_numpy(array.astype(np.float32)), features["conv1"].float())


@pytest.mark.parametrize(
    ("extractor", "selection"),
    [
        *product(("auto", "hook", "torchscript"), ("fourier", "back:input", ["out", "fourier"])),
        ("fx", "fourier"),
    ],
)
def test_complex_values_are_refused(spectrum, extractor, selection) -> None:
    """No extractor returns a complex value: the error names the layer and its dtype."""
    with pytest.raises(errors.ExtractorUnsupportedError, match=r"'(fourier|back:?.*)'.*complex64"):
        spectrum.extract(batch(), selection, extractor=extractor)


def test_complex_layers_are_listed_and_those_behind_are_served(spectrum) -> None:
    """A complex layer says why nothing captures it, and it takes nothing from its neighbours."""
    fourier = spectrum.layers["fourier"]
    assert fourier.extractors() == ()
    assert set(fourier.refusals) == {each for each in Extractor if each is not Extractor.AUTO}
    assert "complex64" in fourier.refusals[Extractor.HOOK][Capture.OUTPUT]
    features = spectrum.extract(batch(), ["back", "out"], extractor="hook")
    for name in ("back", "out"):
        (right,) = outputs_of(hardnets.spectrum(), batch(), name)
        assert torch.equal(features[name], right)


@pytest.mark.parametrize(
    ("change", "layers", "extractor"),
    [
        (lambda x: x[0], "conv1", "auto"),
        (lambda x: x[:, :2], "conv1", "auto"),
        (lambda x: x[:0], "conv1", "auto"),
        (lambda x: x.double().long(), "conv1", "auto"),
        (lambda x: x.to(torch.complex64), "conv1", "auto"),
        (lambda x: x.numpy().astype("U3"), "conv1", "auto"),
        (lambda x: x.to_sparse(), "conv1", "auto"),
        (lambda x: {"y": x}, "conv1", "auto"),
        (lambda x: {}, "conv1", "auto"),
        (lambda x: {"x": x, "y": x}, "conv1", "auto"),
        (lambda x: [], "conv1", "auto"),
        (lambda x: [x], "conv1", "auto"),
        (lambda x: 7, "conv1", "auto"),
        (lambda x: b"no image", "conv1", "auto"),
        (lambda x: "/no/such/file.png", "conv1", "auto"),
        (lambda x: x, "conv7", "auto"),
        (lambda x: x, "nope*", "auto"),
        (lambda x: x, [], "auto"),
        (lambda x: x, ["conv1", "conv1"], "auto"),
        (lambda x: x, "conv1:side", "auto"),
        (lambda x: x, LayerSelection("layer?", alias="a"), "auto"),
        (lambda x: x, LayerSelection("conv1", dtype="int8"), "auto"),
        (lambda x: x, LayerSelection("conv1", dtype="float99"), "auto"),
        (lambda x: x, LayerSelection("fc", reduction=Reduction.TOKEN_GRID), "auto"),
        (lambda x: x, "conv1:input", "fx"),
        (lambda x: x, "layer1.0.add", "hook"),
        (lambda x: x, "conv1", "magic"),
        (lambda x: torch.full_like(x, math.inf), "conv1", "torchscript"),
    ],
)
def test_errors_are_those_of_a_server(
    model: LocalModel, client: Client, change: object, layers: object, extractor: str
) -> None:
    """The server and the local model raise the same class with the same text."""
    given = change(batch())  # type: ignore[operator]
    with pytest.raises(errors.LayertapError) as there:
        client.extract("residual", given, layers, extractor=extractor)  # type: ignore[arg-type]
    with pytest.raises(errors.LayertapError) as here:
        model.extract(given, layers, extractor=extractor)  # type: ignore[arg-type]
    assert (type(here.value), str(here.value)) == (type(there.value), str(there.value))


def test_limits_hold_before_any_compute() -> None:
    """The batch, the layers and the bytes of the tensors are limited; nothing stays counted."""
    limits = Limits(batch=2, layers=2, reply_bytes=5000)
    with load(limits=limits) as model:
        with pytest.raises(errors.InvalidInputError, match="batch of 3, expected at most 2"):
            model.extract(batch(3), "fc")
        with pytest.raises(errors.InvalidInputError, match="layers: got more than 2"):
            model.extract(batch(), ["fc", "conv1", "layer1"])
        # Two items of 8 × 8 × 8 float32 are 4096 bytes; two layers of them are twice that.
        assert model.extract(batch(), "conv1", extractor="hook")["conv1"].nbytes == 4096
        with pytest.raises(errors.ReplyTooLargeError, match="8192 bytes predicted, limit 5000"):
            model.extract(batch(), ["conv1", "layer1"], extractor="hook")
        assert model._engine.pending_bytes == 0
    with (
        load(limits=Limits(pending_bytes=4000)) as model,
        pytest.raises(errors.OverloadedError, match="the reply would take 4096 bytes"),
    ):
        model.extract(batch(), "conv1", extractor="hook")


def test_results_that_are_kept_do_not_count() -> None:
    """The limit of bytes is for running requests: the caller may keep any number of results."""
    with load(limits=Limits(pending_bytes=20_000)) as limited:
        kept = [limited.extract(batch(1), "conv1", extractor="hook") for _ in range(50)]
        assert limited._engine.pending_bytes == 0
    assert sum(features["conv1"].nbytes for features in kept) > 20_000


def test_time_runs_out() -> None:
    """After the timeout DeadlineExceededError is raised, and the model keeps serving."""
    with load() as model:
        with pytest.raises(errors.DeadlineExceededError):
            model.extract(batch(), "conv1", timeout=0)
        assert model.extract(batch(), "conv1", timeout=60)


def test_a_closed_model_says_so() -> None:
    """Closing twice is allowed; every later call raises UnavailableError."""
    with load() as model:
        kept = model.extract(batch(), "conv1", extractor="hook")
    model.close()
    for ask in (lambda: model.extract(batch(), "conv1"), model.describe, lambda: model.signature):
        with pytest.raises(errors.UnavailableError, match="'residual' is closed"):
            ask()
    assert repr(model) == "LocalModel('residual', closed)"
    assert torch.equal(kept["conv1"], outputs_of(tinynets.residual(), batch(), "conv1")[0])


def test_closing_ends_the_threads() -> None:
    """No thread of the model keeps running."""
    before = set(threading.enumerate())
    with load() as model:
        model.extract(batch(), "conv1")
    assert set(threading.enumerate()) <= before


def test_threads_share_a_model(model: LocalModel) -> None:
    """Each of many threads gets the layers of its own batch."""
    batches = [batch(1 + seed % 3, seed) for seed in range(32)]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(model.extract, x, ["layer1", "fc"], extractor="hook") for x in batches]
        found = [each.result(60) for each in asked]
    net = tinynets.residual()
    for x, features in zip(batches, found, strict=True):
        for name, value in features.items():
            assert torch.equal(value, outputs_of(net, x, name)[0])


def test_passes_are_shared_where_that_is_asked_for() -> None:
    """With a batch policy each thread gets its own items."""
    batches = [batch(1, seed) for seed in range(16)]
    with load(max_batch_size=4, max_queue_delay_us=20_000) as model, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(model.extract, x, "layer1", extractor="hook") for x in batches]
        found = [each.result(60) for each in asked]
    net = tinynets.residual()
    for x, features in zip(batches, found, strict=True):
        (true,) = outputs_of(net, x, "layer1")
        # A convolution of more items may round otherwise.
        torch.testing.assert_close(features["layer1"], true, rtol=1e-5, atol=1e-5)


def test_declared_layers_are_compiled() -> None:
    """AUTO serves them by TORCHSCRIPT from the first request on, and other layers by HOOK."""
    with load(layers=["layer1", "avgpool:input=before"]) as model:
        declared = model.extract(batch(1), ["layer1", "avgpool:input=before"])
        assert declared.extractor is Extractor.TORCHSCRIPT
        assert model.extract(batch(1), "conv1").extractor is Extractor.HOOK
    (true,) = outputs_of(tinynets.residual(), batch(1), "layer1")
    torch.testing.assert_close(
        declared["layer1"], true, rtol=0, atol=1e-4 * float(true.abs().max())
    )


def test_a_stateful_model_begins_where_a_fresh_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its first calls gives the same values as that call of a fresh module."""
    # A factory is a function of its module.
    monkeypatch.setattr(statefulnets, "cycles", lambda: statefulnets.build("Cycles"), raising=False)
    with load("statefulnets:cycles") as model:
        values = [model.extract(batch(), "out", extractor="hook")["out"] for _ in range(4)]
    fresh = statefulnets.build("Cycles")
    for value in values:
        assert torch.equal(value, outputs_of(fresh, batch(), "out")[0])
    assert not torch.equal(values[0], values[1])


def test_shapes_that_depend_on_the_content() -> None:
    """A value with another shape than the measured one is returned completely."""
    with load("tinynets:dynamic") as model:
        for seed in range(3):
            x = batch(2, seed) - 0.2 * seed
            value = model.extract(x, "pick", extractor="hook")["pick"]
            assert torch.equal(value, outputs_of(tinynets.dynamic(), x, "pick")[0])


def test_nan_can_be_refused() -> None:
    """``require_finite`` and other settings of a served model work here too."""
    x = batch()
    (true,) = outputs_of(tinynets.not_finite(), x, "tail")
    assert bool(true.isnan().any())
    with load("tinynets:not_finite") as model:
        value = model.extract(x, "tail", extractor="hook")["tail"]
    torch.testing.assert_close(value, true, rtol=0, atol=0, equal_nan=True)
    with (
        load("tinynets:not_finite", require_finite=True) as model,
        pytest.raises(errors.ModelRunError, match="NaN or infinity"),
    ):
        model.extract(x, "tail", extractor="hook")


def test_what_a_model_takes_and_has(model: LocalModel, client: Client) -> None:
    """The catalogue has the server's names, shapes and extractors, in the same order."""
    served = client.describe_model("residual")
    described = model.describe()
    assert [layer.name for layer in described.layers] == [layer.name for layer in served.layers]
    assert list(model.layers) == [layer.name for layer in described.layers]
    layer = model.layers["layer1"]
    assert str(layer) == "layer1: Sequential [B, 8, ceil(H/2), ceil(W/2)] float32"
    assert (layer.stride, layer.channels, layer.output.bytes_per_item) == (2.0, 8, 2048)
    assert set(layer.extractors()) == set(EXTRACTORS)
    assert Extractor.FX not in layer.extractors(Capture.INPUT)
    assert layer.refusals[Extractor.FX][Capture.INPUT] == "it takes outputs only"
    assert model.signature.main.pattern == "[B, 3, H, W]"
    assert model.name == "residual"
    assert repr(model) == "LocalModel('residual', takes x [B, 3, H, W])"
    assert str(described).splitlines()[0].startswith("residual: ")


def test_features_are_a_mapping_that_can_be_pickled(model: LocalModel) -> None:
    """The pickle includes the extractor and the timings, which add up."""
    features = model.extract(batch(), ["fc", "conv1"], extractor="hook")
    assert repr(features) == "LocalFeatures(fc: float32[2, 5], conv1: float32[2, 8, 8, 8])"
    timings = features.timings
    parts = timings.prepare_ns + timings.queue_ns + timings.compute_ns
    assert 0 < parts <= timings.total_ns
    again = pickle.loads(pickle.dumps(features))
    assert (again.extractor, again.timings) == (features.extractor, timings)
    assert all(torch.equal(again[name], features[name]) for name in features)
    with pytest.raises(KeyError):
        features["layer1"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"colour": "red"}, "unknown settings colour"),
        ({"seed": -1}, "seed: got -1"),
        ({"precision": "float8"}, "precision: got 'float8'"),
        ({"item_shape": [3, "a"]}, "item_shape: got"),
        ({"device": "tpu"}, "device: got 'tpu'"),
    ],
)
def test_arguments_that_are_wrong_are_named(settings: dict[str, object], match: str) -> None:
    """The ConfigError says which argument is wrong, its value and what is expected."""
    with pytest.raises(errors.ConfigError, match=match):
        layertap.load("tinynets:residual", **{"item_shape": ITEM, **settings})  # type: ignore[arg-type]


def test_a_model_that_cannot_be_loaded_leaves_no_thread() -> None:
    """This holds too if its declared layers do not exist."""
    before = set(threading.enumerate())
    with pytest.raises(errors.ModelLoadError):
        load("tinynets:nothing")
    with pytest.raises(errors.LayerNotFoundError):
        load(layers="nope")
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("end", "code"), [("", 0), pytest.param("sys.exit(3)", 3, marks=pytest.mark.long)]
)
def test_a_program_ends_that_does_not_close_its_model(end: str, code: int) -> None:
    """However it ends, its threads don't keep the process."""
    script = f"""
import sys
import torch
import layertap
from tinynets import ITEM
model = layertap.load("tinynets:residual", item_shape=ITEM, device="cpu")
print(list(model.extract(torch.rand(1, *ITEM), "layer1")))
{end}
"""
    folders = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("['layer1']\n", code), done.stderr


def test_a_second_load_verifies_what_the_first_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The catalogue is read from the folder that was named, and serves the same values."""
    x = torch.randn(2, *ITEM)
    with load(plan_cache=tmp_path) as first, caplog.at_level("INFO", "layertap"):
        values = first.extract(x, "*", extractor="hook")
        assert "an earlier start" not in caplog.text
        with load(plan_cache=str(tmp_path)) as second:
            assert "its catalogue is the one of an earlier start" in caplog.text
            assert second.describe() == first.describe()
            again = second.extract(x, "*", extractor="hook")
    assert list(again) == list(values)
    assert all(torch.equal(again[name], values[name]) for name in values)


def test_nothing_is_kept_if_the_plan_cache_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, the user's cache folder gets files; with ``off`` it is not even made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with load(plan_cache="off"):
        assert list(tmp_path.iterdir()) == []
    with load():
        assert list(tmp_path.rglob("*.catalogue"))
