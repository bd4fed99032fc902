"""Gradients through a server: the clients and this process give the same bits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
import torch

import gradnets
import layertap
from layertap import AsyncClient, Client, Objective, StreamRequest, errors
from layertap.engine import Engine
from layertap.models import ModelSpec
from layertap.v1 import catalogue_pb2, feature_service_pb2, tensor_pb2
from serving import running_server

LAYERS = ["conv2:gradient", "conv1:input_gradient=before", "inputs.x:gradient", "fc"]
AIMS = {
    "text": "fc[maximum] - 0.5*fc[1]",
    "per item": Objective.element("fc", [2, 4]),
    "path": Objective.maximum("conv2", (1, 2)),
    "vector": Objective.dot("fc", np.linspace(0, 1, 5)),
    "input": Objective.norm("fc").of_input(),
}
IMAGES = torch.randn(2, *gradnets.IMAGE, generator=torch.Generator().manual_seed(1)).double()
SPEC = ModelSpec("gradnets:residual", item_shape=gradnets.IMAGE, input_dtype="float64")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with one net."""
    engine = Engine()
    engine.load(SPEC)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[Client]:
    """A client of a server of that engine."""
    with running_server(engine) as address, Client(address) as client:
        yield client


def local(aim: Objective | str) -> dict[str, np.ndarray]:
    with layertap.load(
        "gradnets:residual", item_shape=gradnets.IMAGE, input_dtype="float64", device="cpu"
    ) as model:
        return dict(model.extract(IMAGES, LAYERS, objective=aim).numpy())


@pytest.mark.parametrize("name", AIMS)
def test_a_server_gives_the_gradients_of_this_process(client: Client, name: str) -> None:
    """Every kind of objective goes over the wire and comes back with the same bits."""
    found = client.extract("residual", IMAGES, LAYERS, objective=AIMS[name])
    expected = local(AIMS[name])
    assert list(found) == list(expected)
    for layer, value in expected.items():
        assert np.array_equal(found[layer], value)


def test_streams_and_asyncio_take_objectives(client: Client) -> None:
    """Each item of a stream has its own objective, and so has a call of the asyncio client."""
    requests = [
        StreamRequest("residual", IMAGES, LAYERS, objective=f"fc[{index}]") for index in range(3)
    ]
    with client.stream() as stream:
        outcomes = dict(stream.extract(requests))

    async def ask() -> dict[str, np.ndarray]:
        async with AsyncClient(client._target) as aio:
            return dict(await aio.extract("residual", IMAGES, LAYERS, objective="fc[1]"))

    alone = asyncio.run(ask())
    for index in range(3):
        single = client.extract("residual", IMAGES, LAYERS, objective=f"fc[{index}]")
        for layer in single:
            outcome = outcomes[index]
            assert not isinstance(outcome, errors.LayertapError)
            assert np.array_equal(outcome[layer], single[layer])
            assert index != 1 or np.array_equal(alone[layer], single[layer])


Term = feature_service_pb2.ObjectiveTerm
VECTOR = tensor_pb2.Tensor(dtype="DATA_TYPE_FLOAT32", shape=[5], data=b"\0" * 20)
NAN = np.full(5, np.nan, np.float32).tobytes()

HOSTILE = {
    "a vector whose bytes don't fit": Term(
        measure="MEASURE_DOT",
        vector=tensor_pb2.Tensor(dtype="DATA_TYPE_FLOAT32", shape=[1 << 40, 1 << 40], data=b"0000"),
    ),
    "a negative size": Term(
        measure="MEASURE_DOT", vector=tensor_pb2.Tensor(dtype="DATA_TYPE_FLOAT32", shape=[-1])
    ),
    "whole numbers as a vector": Term(
        measure="MEASURE_DOT",
        vector=tensor_pb2.Tensor(dtype="DATA_TYPE_INT32", shape=[5], data=b"\0" * 20),
    ),
    "a vector of no dtype": Term(
        measure="MEASURE_DOT", vector=tensor_pb2.Tensor(shape=[5], data=b"\0" * 20)
    ),
    "NaN": Term(
        measure="MEASURE_DOT",
        vector=tensor_pb2.Tensor(dtype="DATA_TYPE_FLOAT32", shape=[5], data=NAN),
    ),
    "a vector in shared memory": Term(
        measure="MEASURE_DOT",
        vector=tensor_pb2.Tensor(shape=[5], shared=tensor_pb2.SharedSlice(region=1)),
    ),
    "no vector": Term(measure="MEASURE_DOT"),
    "a vector for another measure": Term(measure="MEASURE_SUM", vector=VECTOR),
    "an unknown measure": Term(measure=99),
    "a gradient as the side": Term(measure="MEASURE_SUM", capture="CAPTURE_GRADIENT"),
    "an infinite weight": Term(measure="MEASURE_SUM", weight=float("inf")),
    "an index out of range": Term(index=[1 << 62]),
    "a negative index out of range": Term(index=[-(1 << 63)]),
    "no index": Term(),
    "a part of a place": Term(index=[1, 2, 3], index_size=2),
    "long places": Term(index=[0] * 64, index_size=64),
    "a million places": Term(index=[0] * 1_000_000),
    "a layer that does not exist": Term(layer="nix", measure="MEASURE_SUM"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_objectives_have_a_clear_status_before_any_compute(
    engine: Engine, client: Client, case: str
) -> None:
    """A malformed objective is refused without a pass, and the server goes on."""
    layer = feature_service_pb2.LayerSelection(layer="conv2", capture="CAPTURE_GRADIENT")
    request = feature_service_pb2.ExtractRequest(
        model="residual", layers=[layer], objective=[HOSTILE[case]]
    )
    request.inputs.add(
        name="x", dtype="DATA_TYPE_FLOAT64", shape=IMAGES.shape, data=IMAGES.numpy().tobytes()
    )
    status, _ = refused(client, request)
    known = grpc.StatusCode.NOT_FOUND if "exist" in case else grpc.StatusCode.INVALID_ARGUMENT
    assert status is known
    assert client.extract("residual", IMAGES, "conv2:gradient", objective="fc[0]")
    # The bytes of a reply are released when its call has ended, which the client may see first.
    assert until(lambda: engine.pending_bytes == 0)


def test_more_terms_than_allowed_are_refused(client: Client) -> None:
    """Neither seventeen terms nor a message full of them get further than the decoder."""
    layer = feature_service_pb2.LayerSelection(layer="conv2", capture="CAPTURE_GRADIENT")
    for count in (17, 100_000):
        request = feature_service_pb2.ExtractRequest(
            model="residual", layers=[layer], objective=[Term(measure="MEASURE_SUM")] * count
        )
        request.inputs.add(
            name="x", dtype="DATA_TYPE_FLOAT64", shape=IMAGES.shape, data=IMAGES.numpy().tobytes()
        )
        status, message = refused(client, request)
        assert status is grpc.StatusCode.INVALID_ARGUMENT
        assert "terms" in message or "fields" in message


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def refused(
    client: Client, request: feature_service_pb2.ExtractRequest
) -> tuple[grpc.StatusCode, str]:
    with grpc.insecure_channel(client._target) as channel:
        extract = channel.unary_unary("/layertap.v1.FeatureService/Extract")
        with pytest.raises(grpc.RpcError) as raised:
            extract(request.SerializeToString(), timeout=30)
    return raised.value.code(), raised.value.details()


def test_the_wire_has_a_name_for_every_measure_and_capture() -> None:
    """The protocol's enums and the Python ones have the same members."""
    for kind, enum in (
        (layertap.Measure, feature_service_pb2.Measure),
        (layertap.Capture, catalogue_pb2.Capture),
    ):
        prefix = kind.__name__.upper()
        wire = {name.removeprefix(f"{prefix}_") for name in enum.keys()}  # noqa: SIM118
        assert wire == {member.name for member in kind} | {"UNSPECIFIED"}
