"""Gradients through a server: the clients and this process give the same bits."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch

import gradnets
import layertap
import tinynets
from kept import kept
from layertap import (
    AsyncClient,
    Capture,
    Client,
    LayerSelection,
    MapForm,
    Method,
    Objective,
    StreamRequest,
    Sweep,
    errors,
)
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
    """An engine with a net, and one with modules that never run."""
    engine = Engine(plan_cache=kept())
    engine.load(SPEC)
    engine.load(ModelSpec("tinynets:silent", item_shape=tinynets.ITEM))
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
        async with AsyncClient(client._targets[0]) as aio:
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
    "infinity": Term(
        measure="MEASURE_DOT",
        vector=tensor_pb2.Tensor(
            dtype="DATA_TYPE_FLOAT32", shape=[5], data=np.full(5, np.inf, np.float32).tobytes()
        ),
    ),
    "a vector that is too big": Term(
        measure="MEASURE_DOT",
        vector=tensor_pb2.Tensor(
            dtype="DATA_TYPE_FLOAT32", shape=[1 << 20], data=b"\0" * (1 << 22)
        ),
    ),
    "a vector for more items": Term(
        measure="MEASURE_DOT",
        vector=tensor_pb2.Tensor(
            dtype="DATA_TYPE_FLOAT32", shape=[1 << 16, 5], data=b"\0" * (20 << 16)
        ),
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
    "a part of a place": Term(index=[1, 2, 3], place_length=2),
    "long places": Term(index=[0] * 64, place_length=64),
    "a million places": Term(index=[0] * 1_000_000),
    "a layer that does not exist": Term(layer="nix", measure="MEASURE_SUM"),
    "a layer that returns before the selected one": Term(layer="bn1", measure="MEASURE_SUM"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_objectives_have_a_clear_status_before_any_compute(
    engine: Engine, client: Client, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """A malformed objective is refused without a pass, and the server goes on."""
    assert client.extract("residual", IMAGES, "conv2:gradient", objective="fc[0]")  # The trial.
    ran: list[Any] = []
    monkeypatch.setattr("layertap.engine.pipeline.compute", ran.append)
    layer = feature_service_pb2.LayerSelection(layer="conv2", capture="CAPTURE_GRADIENT")
    request = feature_service_pb2.ExtractRequest(
        model="residual", layers=[layer], objective=[HOSTILE[case]]
    )
    request.inputs.add(
        name="x", dtype="DATA_TYPE_FLOAT64", shape=IMAGES.shape, data=IMAGES.numpy().tobytes()
    )
    status, message = refused(client, request)
    monkeypatch.undo()
    known = grpc.StatusCode.NOT_FOUND if "exist" in case else grpc.StatusCode.INVALID_ARGUMENT
    assert status is known, message
    assert message
    assert not ran
    assert client.extract("residual", IMAGES, "conv2:gradient", objective="fc[0]")
    # The bytes of a reply are released when its call has ended, which the client may see first.
    assert until(lambda: engine.pending_bytes == 0)


@pytest.mark.parametrize("what", ["names", "a glob each"])
def test_a_million_selections_are_refused_before_any_compute(
    engine: Engine, client: Client, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """More gradients than a request may have get no further than the decoder."""
    ran: list[Any] = []
    monkeypatch.setattr("layertap.engine.pipeline.compute", ran.append)
    layer = feature_service_pb2.LayerSelection(
        layer="*" if what == "a glob each" else "conv2", capture="CAPTURE_GRADIENT"
    )
    request = feature_service_pb2.ExtractRequest(
        model="residual", layers=[layer] * 1_000_000, objective=[Term(layer="fc", index=[1])]
    )
    request.inputs.add(
        name="x", dtype="DATA_TYPE_FLOAT64", shape=IMAGES.shape, data=IMAGES.numpy().tobytes()
    )
    status, message = refused(client, request)
    assert status is grpc.StatusCode.INVALID_ARGUMENT, message
    assert message
    assert not ran
    assert until(lambda: engine.pending_bytes == 0)


@pytest.mark.parametrize(
    ("layer", "term"),
    [("aux", Term(measure="MEASURE_SUM")), ("body", Term(layer="aux", measure="MEASURE_SUM"))],
    ids=["gradient", "objective"],
)
def test_layers_that_never_run_have_no_gradient(
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    layer: str,
    term: feature_service_pb2.ObjectiveTerm,
) -> None:
    """A module that the model has but never calls is refused as such, before any compute."""
    ran: list[Any] = []
    monkeypatch.setattr("layertap.engine.pipeline.compute", ran.append)
    request = feature_service_pb2.ExtractRequest(
        model="silent",
        layers=[feature_service_pb2.LayerSelection(layer=layer, capture="CAPTURE_GRADIENT")],
        objective=[term],
    )
    request.inputs.add(
        dtype="DATA_TYPE_FLOAT32",
        shape=[1, *tinynets.ITEM],
        data=b"\0" * 4 * math.prod(tinynets.ITEM),
    )
    status, message = refused(client, request)
    assert status is grpc.StatusCode.FAILED_PRECONDITION, message
    assert "never runs" in message
    assert not ran


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
    with grpc.insecure_channel(client._targets[0]) as channel:
        extract = channel.unary_unary("/layertap.v1.FeatureService/Extract")
        with pytest.raises(grpc.RpcError) as raised:
            extract(request.SerializeToString(), timeout=30)
    return raised.value.code(), raised.value.details()


def test_numbers_that_the_model_can_not_hold_are_refused() -> None:
    """A vector, weight or baseline that is infinite in the layer's dtype is no silent NaN."""
    huge = np.full(3, 1e39)
    with layertap.load("gradnets:last", item_shape=(3, 16, 16), device="cpu") as model:
        given = torch.rand(1, 3, 16, 16)
        for aim in (
            Objective.dot("fc", huge), Objective.sum("fc") * 1e39, Objective.sum("fc") * -1e39,
        ):  # fmt: skip
            with pytest.raises(errors.InvalidInputError, match="got a magnitude of 1e\\+39"):
                model.extract(given, "mix:gradient", objective=aim)
        for base in (1e39, np.full((8, 8, 6), 1e39)):
            selection = LayerSelection(
                "mix",
                Capture.GRADIENT,
                method=Method.INTEGRATED_GRADIENTS,
                sweep=Sweep(steps=2, baseline=base),
            )
            with pytest.raises(errors.InvalidInputError, match="sweep: baseline: got a magnitude"):
                model.extract(given, selection, objective="fc[1]")
        # The largest number of the dtype is a number.
        largest = Objective.sum("fc") * float(np.finfo(np.float32).max)
        assert "mix:gradient" in model.extract(given, "mix:gradient", objective=largest)


HOSTILE_SWEEPS = {
    "a baseline whose bytes don't fit": tensor_pb2.Tensor(
        dtype="DATA_TYPE_FLOAT64", shape=[1 << 40, 1 << 40], data=b"0000"
    ),
    "a baseline of another shape": tensor_pb2.Tensor(
        dtype="DATA_TYPE_FLOAT64", shape=[1], data=b"\0" * 8
    ),
    "a baseline of whole numbers": tensor_pb2.Tensor(
        dtype="DATA_TYPE_INT64", shape=[1], data=b"\0" * 8
    ),
    "a baseline with NaN": tensor_pb2.Tensor(dtype="DATA_TYPE_FLOAT32", shape=[5], data=NAN),
    "a baseline in shared memory": tensor_pb2.Tensor(
        shape=[5], shared=tensor_pb2.SharedSlice(region=1)
    ),
}


@pytest.mark.parametrize("case", HOSTILE_SWEEPS)
def test_hostile_baselines_have_a_clear_status(engine: Engine, client: Client, case: str) -> None:
    """A baseline that doesn't fit is refused, and the server goes on."""
    layer = feature_service_pb2.LayerSelection(
        layer="conv2",
        capture="CAPTURE_GRADIENT",
        method="METHOD_INTEGRATED_GRADIENTS",
        sweep=feature_service_pb2.Sweep(steps=2, baseline_tensor=HOSTILE_SWEEPS[case]),
    )
    request = feature_service_pb2.ExtractRequest(
        model="residual", layers=[layer], objective=[Term(layer="fc", index=[1])]
    )
    request.inputs.add(
        name="x", dtype="DATA_TYPE_FLOAT64", shape=IMAGES.shape, data=IMAGES.numpy().tobytes()
    )
    status, message = refused(client, request)
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert "sweep: baseline" in message
    assert until(lambda: engine.pending_bytes == 0)


@pytest.mark.parametrize(
    "layer",
    [
        {"method": 99},
        {"method": "METHOD_GRAD_CAM", "map_form": 99},
        {"method": "METHOD_GRADIENT", "map_form": "MAP_FORM_RESIZED"},
        {"method": "METHOD_EIGEN_CAM"},
        {"method": "METHOD_GRAD_CAM", "map_form": "MAP_FORM_OVERLAY", "reduction": 99},
    ],
)
def test_hostile_methods_have_a_clear_status(client: Client, layer: dict[str, Any]) -> None:
    """Unknown methods and forms, and those that don't go together, are refused."""
    selection = feature_service_pb2.LayerSelection(
        layer="conv2", capture="CAPTURE_GRADIENT", **layer
    )
    request = feature_service_pb2.ExtractRequest(
        model="residual", layers=[selection], objective=[Term(layer="fc", index=[1])]
    )
    request.inputs.add(
        name="x", dtype="DATA_TYPE_FLOAT64", shape=IMAGES.shape, data=IMAGES.numpy().tobytes()
    )
    status, _ = refused(client, request)
    assert status is grpc.StatusCode.INVALID_ARGUMENT


def test_every_method_goes_over_the_wire(client: Client) -> None:
    """Methods, forms of maps, options and tensor baselines give the bits of this process."""
    base = np.random.default_rng(1).normal(size=(2, 4, 8, 8))
    sweep = Sweep(steps=3, baseline=base)
    selections = [
        LayerSelection("conv2", method=Method.EIGEN_CAM, map_form=MapForm.RESIZED),
        *(
            LayerSelection("conv2", Capture.GRADIENT, method=method, sweep=sweep)
            for method in Method
            if method.takes_gradient
        ),
        LayerSelection("bn1", Capture.GRADIENT, method=Method.GRAD_CAM, map_form=MapForm.OVERLAY),
    ]
    found = client.extract("residual", IMAGES, selections, objective="fc[maximum]")
    with layertap.load(
        "gradnets:residual", item_shape=gradnets.IMAGE, input_dtype="float64", device="cpu"
    ) as model:
        expected = model.extract(IMAGES, selections, objective="fc[maximum]").numpy()
    assert list(found) == list(expected)
    assert "conv2:guided_backpropagation.relus" in found
    assert found["bn1:grad_cam"].dtype == np.uint8
    for name, value in expected.items():
        assert np.array_equal(found[name], value)


def test_the_wire_has_a_name_for_every_measure_and_capture() -> None:
    """The protocol's enums and the Python ones have the same members."""
    for kind, enum in (
        (layertap.Measure, feature_service_pb2.Measure),
        (layertap.Capture, catalogue_pb2.Capture),
        (layertap.Method, feature_service_pb2.Method),
        (layertap.MapForm, feature_service_pb2.MapForm),
        (layertap.IntegrationRule, feature_service_pb2.IntegrationRule),
    ):
        prefix = re.sub("(?<!^)(?=[A-Z])", "_", kind.__name__).upper()
        wire = {name.removeprefix(f"{prefix}_") for name in enum.keys()}  # noqa: SIM118
        assert wire == {member.name for member in kind} | {"UNSPECIFIED"}
