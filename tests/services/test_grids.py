"""Grids, concatenations and projections through a server: the same bits as in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

import layertap
from kept import kept
from layertap import AsyncClient, Client, LayerSelection, Projection, Regrid, Resize, StreamRequest
from layertap.engine import Engine
from layertap.models import ModelSpec
from layertap.v1 import feature_service_pb2, tensor_pb2
from serving import running_server
from tinynets import ITEM

X = np.random.default_rng(0).random((2, *ITEM), np.float32)
NUMBERS = np.random.default_rng(1)
LAYERS = [
    "layer1+layer2:around=3=patches",
    LayerSelection("layer2", regrid=Regrid(size=(2, 3), resize=Resize.AVERAGE_POOL), alias="small"),
    LayerSelection(
        "layer1",
        concat=("layer2",),
        projection=Projection(NUMBERS.random((5, 24)), NUMBERS.random(24, np.float32)),
    ),
    LayerSelection("fc", projection=Projection(NUMBERS.random((2, 5), np.float32))),
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a server of one net."""
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    with running_server(engine) as address:
        yield address
    engine.close()


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """The layers in this process."""
    with layertap.load("tinynets:residual", item_shape=ITEM, device="cpu") as model:
        return dict(model.extract(X, LAYERS, extractor="hook").numpy())


def check(found: object, expected: dict[str, np.ndarray]) -> None:
    assert isinstance(found, dict)
    assert list(found) == list(expected) == ["patches", "small", "layer1+layer2", "fc"]
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name


def test_calls_streams_and_asyncio(address: str, expected: dict[str, np.ndarray]) -> None:
    """Every client sends them, and gets the same bits."""

    async def ask() -> dict[str, np.ndarray]:
        async with AsyncClient(address) as client:
            return dict(await client.extract("residual", X, LAYERS, extractor="hook"))

    with Client(address) as client:
        check(dict(client.extract("residual", X, LAYERS, extractor="hook")), expected)
        with client.stream() as stream:
            [(_, outcome)] = stream.extract([StreamRequest("residual", X, LAYERS, "hook")])
        assert not isinstance(outcome, layertap.LayertapError)
        check(dict(outcome), expected)
    check(asyncio.run(ask()), expected)


Selection = feature_service_pb2.LayerSelection
Sent = feature_service_pb2.Projection
FLOAT = "DATA_TYPE_FLOAT32"


def tensor(shape: list[int], data: bytes, dtype: str = FLOAT) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=dtype, shape=shape, data=data)


ONES = np.ones((1, 16), np.float32).tobytes()
NAN = np.full((1, 16), np.nan, np.float32).tobytes()
HOSTILE = {
    "no matrix": Selection(layer="layer2", projection=Sent()),
    "no size": Selection(layer="layer2", projection=Sent(matrix=tensor([16], ONES))),
    "too few bytes": Selection(
        layer="layer2", projection=Sent(matrix=tensor([1 << 40, 1 << 40], b"0000"))
    ),
    "a negative size": Selection(layer="layer2", projection=Sent(matrix=tensor([-1, 16], b""))),
    "no rows": Selection(layer="layer2", projection=Sent(matrix=tensor([0, 16], b""))),
    "NaN": Selection(layer="layer2", projection=Sent(matrix=tensor([1, 16], NAN))),
    "whole numbers": Selection(
        layer="layer2", projection=Sent(matrix=tensor([1, 16], ONES, "DATA_TYPE_INT32"))
    ),
    "no dtype": Selection(
        layer="layer2", projection=Sent(matrix=tensor_pb2.Tensor(shape=[1, 16], data=ONES))
    ),
    "shared memory": Selection(
        layer="layer2",
        projection=Sent(
            matrix=tensor_pb2.Tensor(shape=[1, 16], shared=tensor_pb2.SharedSlice(region=1))
        ),
    ),
    "another mean": Selection(
        layer="layer2",
        projection=Sent(matrix=tensor([1, 16], ONES), mean=tensor([4], ONES[:16])),
    ),
    "another number of channels": Selection(
        layer="layer1", projection=Sent(matrix=tensor([1, 16], ONES))
    ),
    "an even square": Selection(layer="layer2", regrid={"around": 4}),
    "a huge square": Selection(layer="layer2", regrid={"around": (1 << 32) - 1}),
    "one side": Selection(layer="layer2", regrid={"height": 4}),
    "a huge side": Selection(layer="layer2", regrid={"height": 4, "width": (1 << 32) - 1}),
    "an unknown way": Selection(layer="layer2", regrid={"height": 4, "width": 4, "resize": 9}),
    "a glob": Selection(layer="layer1", concat=["layer*"]),
    "too many layers": Selection(layer="layer1", concat=["layer1"] * 100_000),
    "a map": Selection(layer="layer1", concat=["layer2"], method="METHOD_EIGEN_CAM"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_request_may_not_say(address: str, name: str) -> None:
    """The status is INVALID_ARGUMENT, and the server goes on."""
    request = feature_service_pb2.ExtractRequest(
        model="residual",
        inputs=[tensor_pb2.Tensor(dtype=FLOAT, shape=X.shape, data=X.tobytes())],
        layers=[HOSTILE[name]],
    )
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(
            "/layertap.v1.FeatureService/Extract",
            feature_service_pb2.ExtractRequest.SerializeToString,
            feature_service_pb2.ExtractResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as raised:
            call(request, timeout=60)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT, raised.value.details()
        del request.layers[:]
        request.layers.append(Selection(layer="layer2"))
        assert call(request, timeout=60).tensors[0].name == "layer2"


def test_a_missing_layer_of_a_concatenation(address: str) -> None:
    """It is not found, as any other layer."""
    with (
        Client(address) as client,
        pytest.raises(layertap.errors.LayerNotFoundError, match="layer9"),
    ):
        client.extract("residual", X, "layer1+layer9")
