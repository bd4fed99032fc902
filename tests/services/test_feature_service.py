"""The service gives correct answers, and refuses bad input with a status and a text."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from kept import kept
from layertap import Client, Extractor, LayerSelection, Reduction
from layertap.engine import Engine, Limits
from layertap.errors import InvalidInputError
from layertap.models import ModelSpec
from layertap.selection import Capture
from layertap.v1 import catalogue_pb2, feature_service_pb2, tensor_pb2
from serving import running_server
from tinynets import ITEM

PHOTO = Path(__file__).parents[2] / "examples" / "images" / "grace_hopper.jpg"
NETS = ("residual", "dynamic", "raises", "writes_input", "tokens", "containers")
LIMITS = Limits(reply_bytes=1 << 20, batch=64, pixels=1 << 20, layers=40)
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with tiny nets and low limits."""
    engine = Engine(LIMITS, plan_cache=kept())
    for name in NETS:
        engine.load(ModelSpec(f"tinynets:{name}", item_shape=ITEM))
    engine.load(ModelSpec("tinynets:containers", name="pairs", item_shape=(2, 16, 16)))
    engine.load(ModelSpec("resnet18", weights="random"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    """The address of a real server."""
    with running_server(engine) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Client]:
    """A client of that server."""
    with Client(address) as client:
        yield client


@pytest.fixture(scope="module")
def call(address: str) -> Iterator[grpc.UnaryUnaryMultiCallable]:
    """Extract with raw bytes, for messages that a client would not send."""
    with grpc.insecure_channel(address) as channel:
        yield channel.unary_unary("/layertap.v1.FeatureService/Extract")


@pytest.fixture(autouse=True)
def _server_unharmed(client: Client) -> Iterator[None]:
    """After each test, whatever it sent, the server answers correctly."""
    yield
    assert client.extract("residual", batch(1), "layer1")["layer1"].shape == (1, 8, 8, 8)


def batch(size: int) -> np.ndarray:
    return np.random.default_rng(5).random((size, *ITEM), dtype=np.float32)


def request(**changes: object) -> feature_service_pb2.ExtractRequest:
    x = batch(1)
    fields: dict[str, object] = {
        "model": "residual",
        "inputs": [tensor_pb2.Tensor(dtype=1, shape=x.shape, data=x.tobytes())],
        "layers": [feature_service_pb2.LayerSelection(layer="layer1")],
    }
    return feature_service_pb2.ExtractRequest(**{**fields, **changes})


def selections(*layers: str, **fields: object) -> list[feature_service_pb2.LayerSelection]:
    return [feature_service_pb2.LayerSelection(layer=layer, **fields) for layer in layers]


def tensor(shape: tuple[int, ...], dtype: int = 1, data: bytes | None = None) -> tensor_pb2.Tensor:
    size = {1: 4, 2: 2, 6: 1}[dtype]
    filled = bytes(int(np.prod(shape)) * size) if data is None else data
    return tensor_pb2.Tensor(dtype=dtype, shape=shape, data=filled)


def images(*files: bytes) -> list[feature_service_pb2.ImageBatch]:
    return [feature_service_pb2.ImageBatch(images=files)]


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


BAD = {
    "unknown model": (request(model="resnet19"), Code.NOT_FOUND, "'resnet19', served models: 'res"),
    "no model": (request(model=""), Code.NOT_FOUND, "model: got ''"),
    "misspelt layer": (
        request(layers=selections("layer_1")), Code.NOT_FOUND, "did you mean 'layer1'",
    ),
    "glob without a match": (
        request(layers=selections("stage*")), Code.NOT_FOUND, "glob 'stage*' matches no layer",
    ),
    "no layers": (request(layers=[]), Code.INVALID_ARGUMENT, "layers: got none"),
    "two outputs with one name": (
        request(layers=selections("bn1", "layer1", alias="x")),
        Code.INVALID_ARGUMENT, "two outputs are called 'x'",
    ),
    "alias on a glob": (
        request(layers=selections("layer*", alias="x")), Code.INVALID_ARGUMENT, "names one output",
    ),
    "too many layers": (
        request(layers=selections("**", "**", "**")),
        Code.INVALID_ARGUMENT, "more than 40, the most allowed",
    ),
    "no input": (
        feature_service_pb2.ExtractRequest(model="residual", layers=selections("layer1")),
        Code.INVALID_ARGUMENT, "inputs: got none, expected tensors, images, texts or audio",
    ),
    "inputs and images": (
        request(images=images(png(8, 8))), Code.INVALID_ARGUMENT, "input 'x': got a tensor and ima",
    ),
    "an input of another name": (
        request(inputs=[tensor_pb2.Tensor(name="y", dtype=1, shape=[0])]),
        Code.INVALID_ARGUMENT, "inputs: got 'y', expected x [B, 3, H, W]",
    ),
    "several inputs": (
        request(inputs=[tensor((1, *ITEM))] * 2),
        Code.INVALID_ARGUMENT, "inputs: got '', '', expected each name once",
    ),
    "more inputs than any model has": (
        request(inputs=[tensor((1, *ITEM))] * 257), Code.INVALID_ARGUMENT, "more than 256 tensors",
    ),
    "rank": (
        request(inputs=[tensor(ITEM)]), Code.INVALID_ARGUMENT, "got shape [3, 16, 16]",
    ),
    "channels": (
        request(inputs=[tensor((1, 4, 16, 16))]),
        Code.INVALID_ARGUMENT, "got shape [1, 4, 16, 16], expected [B, 3, H, W]",
    ),
    "dtype": (
        request(inputs=[tensor((1, *ITEM), dtype=6)]),
        Code.INVALID_ARGUMENT, "got dtype uint8, expected float32",
    ),
    "dtype without a row": (
        request(inputs=[tensor_pb2.Tensor(dtype=77, shape=[0])]), Code.INVALID_ARGUMENT, "77",
    ),
    "byte count": (
        request(inputs=[tensor((1, *ITEM), data=bytes(100))]), Code.INVALID_ARGUMENT, "100",
    ),
    "negative size": (
        request(inputs=[tensor_pb2.Tensor(dtype=1, shape=[-1, 3, 16, 16])]),
        Code.INVALID_ARGUMENT, "shape: got a negative size",
    ),
    "empty batch": (
        request(inputs=[tensor((0, *ITEM))]), Code.INVALID_ARGUMENT, "got shape [0, 3, 16, 16]",
    ),
    "batch over the limit": (
        request(inputs=[tensor((65, *ITEM))]),
        Code.INVALID_ARGUMENT, "got a batch of 65, expected at most 64",
    ),
    "size that the model can't take": (
        request(model="tokens", inputs=[tensor((1, 3, 2, 2))], layers=selections("encoder")),
        Code.INVALID_ARGUMENT, "can't run on items of x [3, 2, 2]",
    ),
    "images of a model that takes none": (
        request(model="pairs", inputs=[], images=images(png(8, 8)), layers=selections("add")),
        Code.INVALID_ARGUMENT, "images",
    ),
    "no images": (
        request(model="resnet18", inputs=[], images=images()),
        Code.INVALID_ARGUMENT, "images: got none",
    ),
    "a text file as an image": (
        request(
            model="resnet18", inputs=[], images=images(PHOTO.read_bytes(), b"# Not a picture\n")
        ),
        Code.INVALID_ARGUMENT, "images[1]",
    ),
    "a truncated JPEG": (
        request(model="resnet18", inputs=[], images=images(PHOTO.read_bytes()[:20_000])),
        Code.INVALID_ARGUMENT, "images[0]",
    ),
    "a decompression bomb": (
        request(model="resnet18", inputs=[], images=images(png(30_000, 30_000))),
        Code.INVALID_ARGUMENT, "images[0]",
    ),
    "an extractor that can't": (
        request(layers=selections("layer1.0"), extractor=catalogue_pb2.EXTRACTOR_CHILDREN),
        Code.FAILED_PRECONDITION, "not a top-level child",
    ),
    "an input by an extractor that takes outputs": (
        request(
            layers=selections("layer1", capture=catalogue_pb2.CAPTURE_INPUT),
            extractor=catalogue_pb2.EXTRACTOR_FX,
        ),
        Code.FAILED_PRECONDITION,
        "it takes outputs only; extractors that can: TORCHSCRIPT, EXPORT, HOOK",
    ),
    "an unknown extractor": (
        request(extractor=99), Code.INVALID_ARGUMENT, "extractor: got enum value 99",
    ),
    "a layer that returns a container": (
        request(model="containers", layers=selections("pair")),
        Code.FAILED_PRECONDITION, "request a member of it, such as pair.0",
    ),
    "a reduction that doesn't fit": (
        request(layers=selections("layer1", reduction=feature_service_pb2.REDUCTION_CLASS_TOKEN)),
        Code.INVALID_ARGUMENT, "CLASS_TOKEN takes [B, N, C]",
    ),
    "a dtype that values can't be sent in": (
        request(layers=selections("layer1", dtype=tensor_pb2.DATA_TYPE_INT8)),
        Code.INVALID_ARGUMENT, "got int8, expected float32, float16 or bfloat16",
    ),
    "a reply over the limit": (
        request(model="resnet18", inputs=[tensor((2, 3, 224, 224))], layers=selections("layer1")),
        Code.OUT_OF_RANGE, "predicted, limit 1048576 bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_status_and_a_text(call, case) -> None:
    """Each kind of bad input has its status, and the text says what was got and expected."""
    message, code, text = BAD[case]
    with pytest.raises(grpc.RpcError) as refusal:
        call(message.SerializeToString(), timeout=60)
    assert refusal.value.code() is code
    assert text in refusal.value.details()


@pytest.mark.parametrize("message", [b"\xff\xff\xff", b"\x0a\x05ab", b"\x22\x02\xff\xff\x08"])
def test_bytes_that_are_no_request_are_invalid(call, message) -> None:
    """A malformed message is INVALID_ARGUMENT, not an internal error."""
    with pytest.raises(grpc.RpcError) as refusal:
        call(message, timeout=60)
    assert refusal.value.code() is Code.INVALID_ARGUMENT


def test_a_model_that_fails_says_so_without_its_internals(call) -> None:
    """The model's exception is logged; the caller only learns that the model failed."""
    large = np.full((1, *ITEM), 1e6, np.float32)
    message = request(
        model="raises", layers=selections("head"), inputs=[tensor((1, *ITEM), data=large.tobytes())]
    )
    with pytest.raises(grpc.RpcError) as failure:
        call(message.SerializeToString(), timeout=60)
    assert failure.value.code() is Code.INTERNAL
    assert failure.value.details() == "model 'raises' failed on this input (RuntimeError)"


def test_nothing_is_computed_for_a_reply_over_the_limit(engine, client, call, monkeypatch) -> None:
    """The predicted size is checked against the limit before the model runs."""
    client.extract("resnet18", np.zeros((1, 3, 224, 224), np.float32), "layer1")
    ran: list[str] = []
    module = engine.host("resnet18").model.module
    handle = module.register_forward_pre_hook(lambda m, a: ran.append("ran"))
    message = request(
        model="resnet18", inputs=[tensor((2, 3, 224, 224))], layers=selections("layer1")
    )
    with pytest.raises(grpc.RpcError, match="predicted"):
        call(message.SerializeToString(), timeout=60)
    handle.remove()
    assert ran == []


def test_images_are_preprocessed_with_the_models_own_transform(engine, client) -> None:
    """A real photo gives the same values as the model's transform and eager PyTorch."""
    model = engine.host("resnet18").model
    with Image.open(PHOTO) as image:
        x = model.preprocess(image.convert("RGB"))[None]
    seen: list[torch.Tensor] = []
    handle = model.module.layer4.register_forward_hook(lambda m, a, y: seen.append(y.clone()))
    model.module(x)
    handle.remove()
    features = client.extract("resnet18", PHOTO, "layer4", extractor=Extractor.HOOK)
    assert np.array_equal(features["layer4"], seen[0].numpy())


def test_a_batch_of_images_keeps_its_order(client) -> None:
    """Images of different sizes and formats form one batch, in the order sent."""
    red, blue = (
        Image.new("RGB", size, color) for size, color in (((300, 250), "red"), ((99, 400), "blue"))
    )
    both = client.extract("resnet18", [red, blue], "avgpool", extractor=Extractor.HOOK)["avgpool"]
    alone = client.extract("resnet18", blue, "avgpool", extractor=Extractor.HOOK)["avgpool"]
    assert both.shape == (2, 512, 1, 1)
    assert np.allclose(both[1], alone[0], rtol=1e-5, atol=1e-6)
    assert not np.allclose(both[0], alone[0], rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_are_sent_in_the_type_asked_for(client, dtype) -> None:
    """Casting values gives the same result as in torch."""
    x = batch(2)
    plain = client.extract("residual", x, "layer1", extractor="hook").torch()["layer1"]
    features = client.extract(
        "residual", x, [LayerSelection("layer1", dtype=dtype)], extractor="hook"
    )
    assert torch.equal(features.torch()["layer1"], plain.to(getattr(torch, dtype)))


def test_reductions(client) -> None:
    """Pooling, flattening, the class token and the token grid give torch's values."""
    x = batch(2)
    layer1 = client.extract("residual", x, "layer1", extractor="hook").torch()["layer1"]
    tokens = client.extract("tokens", x, "encoder", extractor="hook").torch()["encoder"]

    def reduced(model: str, layer: str, reduction: Reduction) -> torch.Tensor:
        selection = LayerSelection(layer, reduction=reduction)
        return client.extract(model, x, [selection], extractor="hook").torch()[layer]

    pooled = reduced("residual", "layer1", Reduction.GLOBAL_AVERAGE_POOL)
    assert torch.allclose(pooled, layer1.mean((2, 3)), rtol=1e-6)
    assert torch.equal(reduced("residual", "layer1", Reduction.FLATTEN), layer1.flatten(1))
    assert torch.equal(reduced("tokens", "encoder", Reduction.CLASS_TOKEN), tokens[:, 0])
    grid = reduced("tokens", "encoder", Reduction.TOKEN_GRID)
    assert grid.shape == (2, 6, 4, 4)
    assert torch.equal(grid[:, :, 1, 2], tokens[:, 1 + 4 + 2])


def test_one_layer_may_be_asked_for_in_several_ways(client) -> None:
    """One capture serves several outputs, each with its own name, reduction and dtype."""
    features = client.extract(
        "residual",
        batch(1),
        [
            LayerSelection("layer2"),
            LayerSelection("layer2", alias="half", dtype="float16"),
            LayerSelection("layer2", alias="pooled", reduction=Reduction.GLOBAL_AVERAGE_POOL),
            LayerSelection("layer2", Capture.INPUT),
        ],
    )
    assert {name: (str(v.dtype), v.shape) for name, v in features.items()} == {
        "layer2": ("float32", (1, 16, 4, 4)),
        "half": ("float16", (1, 16, 4, 4)),
        "pooled": ("float32", (1, 16)),
        "layer2:input": ("float32", (1, 8, 8, 8)),
    }


def test_globs_match_in_catalogue_order(client) -> None:
    """A glob returns its matches in execution order, under their own names."""
    assert list(client.extract("residual", batch(1), ["layer?", "bn1"])) == [
        "layer1",
        "layer2",
        "bn1",
    ]


def test_containers_come_apart(client) -> None:
    """Members of a tuple and of a dict are layers, and so are a module's several inputs."""
    x = batch(2)
    features = client.extract(
        "containers", x, ["pair.0", "pair.1.0", "named.low", "add.other:input"]
    )
    assert np.array_equal(features["pair.0"], x + 1)
    assert np.array_equal(features["pair.1.0"], x * 2)
    assert np.array_equal(features["named.low"], x + 1 - 1)
    assert np.array_equal(features["add.other:input"], x * 2)


def test_content_dependent_shapes_are_served(client) -> None:
    """An output of unpredictable size is returned completely, to each request its own."""
    model_scores = [client.extract("dynamic", batch(n), ["score", "pick"]) for n in (1, 2, 7)]
    for features in model_scores:
        scores = features["score"]
        assert np.array_equal(features["pick"], scores[scores > 0])


def test_reductions_beside_content_dependent_shapes(client) -> None:
    """A reduction works alongside a layer of unknown size, and is refused for that layer."""
    pooled = LayerSelection("score", alias="pooled", reduction=Reduction.GLOBAL_AVERAGE_POOL)
    features = client.extract("dynamic", batch(2), ["pick", "score", pooled], extractor="hook")
    assert features["pooled"].shape == (2, 1)
    assert np.allclose(features["pooled"], features["score"].mean((2, 3)), rtol=1e-5)
    flat = LayerSelection("pick", reduction=Reduction.FLATTEN)
    with pytest.raises(InvalidInputError, match="FLATTEN takes"):
        client.extract("dynamic", batch(2), flat)


def test_a_model_that_overwrites_its_batch_does_no_harm(client) -> None:
    """The same request gives the same answer twice, although the model writes into its input."""
    x = batch(2)
    first, second = (client.extract("writes_input", x, "conv")["conv"] for _ in range(2))
    assert np.array_equal(first, second)


def test_list_models(client) -> None:
    """The list has every model with its source, weights, device and input."""
    models = client.list_models()
    assert [model.name for model in models] == [*NETS, "pairs", "resnet18"]
    resnet = models[-1]
    assert (resnet.source, resnet.device) == ("torchvision:resnet18", "cpu")
    assert [(dim.size, dim.batch, dim.free) for dim in resnet.inputs[0].shape] == [
        (1, True, ""), (3, False, ""), (224, False, "H"), (224, False, "W"),
    ]  # fmt: skip
    assert resnet.inputs[0].name == "x"
    assert resnet.inputs[0].images
    assert "224" in resnet.inputs[0].preprocessing


def test_describe_tells_the_image_preprocessing(client) -> None:
    """Each step has its own field, with its origin, and whether it was assumed."""
    known = client.describe_model("resnet18").model.inputs[0].image_preprocessing
    assumed = client.describe_model("residual").model.inputs[0].image_preprocessing

    assert (known.color, known.exif_orientation) == ("rgb", True)
    assert (list(known.resize), known.resize_mode) == ([256], "short side")
    assert (known.interpolation, list(known.crop)) == ("bilinear", [224, 224])
    assert np.allclose(known.mean, [0.485, 0.456, 0.406])
    assert np.allclose(known.std, [0.229, 0.224, 0.225])
    assert known.origin == "torchvision's ResNet18_Weights.IMAGENET1K_V1"
    assert (list(known.assumed), known.custom) == ([], "")
    assert "image_mean" in assumed.assumed
    assert not client.describe_model("pairs").model.inputs[0].HasField("image_preprocessing")


def test_describe_model(client) -> None:
    """The catalogue has each layer's measured shape, and each extractor's verdict."""
    layers = {layer.name: layer for layer in client.describe_model("residual").layers}
    layer2 = layers["layer2"]
    assert (layer2.type, layer2.calls, layer2.channels, layer2.reduction) == (
        "Sequential",
        1,
        16,
        4,
    )
    assert [(dim.size, dim.batch) for dim in layer2.output.shape] == [
        (1, True), (16, False), (4, False), (4, False),
    ]  # fmt: skip
    assert layer2.output.bytes_per_item == 16 * 4 * 4 * 4
    verdicts = {
        (support.extractor, verdict.capture): verdict
        for support in layers["fc"].extractors
        for verdict in support.captures
    }
    output, given = catalogue_pb2.CAPTURE_OUTPUT, catalogue_pb2.CAPTURE_INPUT
    assert not verdicts[catalogue_pb2.EXTRACTOR_CHILDREN, output].served
    assert "'fc'" in verdicts[catalogue_pb2.EXTRACTOR_CHILDREN, output].reason
    assert verdicts[catalogue_pb2.EXTRACTOR_HOOK, given].served
    refused = verdicts[catalogue_pb2.EXTRACTOR_FX, given]
    assert (refused.served, refused.reason) == (False, "it takes outputs only")


def test_describe_refuses_an_unknown_model_and_a_malformed_request(address) -> None:
    """Describing returns the same statuses as extracting."""
    with grpc.insecure_channel(address) as channel:
        describe = channel.unary_unary("/layertap.v1.FeatureService/DescribeModel")
        with pytest.raises(grpc.RpcError) as unknown:
            describe(feature_service_pb2.DescribeModelRequest(model="x").SerializeToString())
        assert unknown.value.code() is Code.NOT_FOUND
        with pytest.raises(grpc.RpcError) as malformed:
            describe(b"\x0a\xff")
        assert malformed.value.code() is Code.INVALID_ARGUMENT


def test_timings_add_up(client) -> None:
    """The reply says how the server's time was spent."""
    timings = client.extract("residual", batch(1), "layer1").timings
    parts = (timings.prepare_ns, timings.queue_ns, timings.compute_ns)
    assert all(part > 0 for part in parts)
    assert sum(parts) <= timings.total_ns
