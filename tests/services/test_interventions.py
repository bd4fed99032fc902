"""Interventions through a server: the clients and this process give the same bits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import torch

import gradnets
import layertap
import tinynets
from infering import given, output, parameters
from kept import kept
from layertap import AsyncClient, Client, Intervention, Span, StreamRequest, errors
from layertap.engine import Engine
from layertap.inference import grpc_service_pb2 as infer
from layertap.intervention import parse_interventions
from layertap.models import ModelSpec
from layertap.v1 import feature_service_pb2, tensor_pb2
from layertap.wire.interventions import interventions_from_proto, interventions_to_proto
from serving import running_server

LAYERS = ["conv2", "relu_1", "fc"]
IMAGES = torch.randn(2, *gradnets.IMAGE, generator=torch.Generator().manual_seed(1)).double()
SPEC = ModelSpec("gradnets:residual", item_shape=gradnets.IMAGE, input_dtype="float64")
VECTOR = np.linspace(-1, 1, 4)

EVERY: dict[str, Any] = {
    "zero": Intervention.zero("conv2", channel=[1, -1], y=range(2, 8, 3)),
    "set": Intervention.set_to("conv2", float("inf"), x=Span(-3), item=1),
    "mean": Intervention.mean("conv2", ["y", "x", "item"], dims={0: [2, 0]}),
    "mean by number": Intervention.mean("conv2", [0, 2]),
    "scale": Intervention.scale("bn1", -2).of_input(),
    "add": Intervention.add("conv1", VECTOR, factor=3),
    "replace": Intervention.replace("conv2", np.ones((2, 4, 8, 8))),
    "patch": Intervention.patch("relu", 1, item=0),
    "project out": Intervention.project_out("conv2", VECTOR),
    "project keep": Intervention.project_keep("conv2", VECTOR),
    "cap": Intervention.cap("conv2", VECTOR.astype(np.float32), low=-0.5, high=0.25),
    "clamp": Intervention.clamp("relu", low=0.1),
    "noise": Intervention.noise("relu*", 0.5, seed=(1 << 62) + 7),
    "skip": Intervention.skip("shortcut"),
    "text": "conv2:channel=0..2:scale=0.25",
    "several": ["conv1:channel=1:zero", Intervention.add("relu", 2.0)],
    "sets": [["conv1:zero"], ["relu:channel=2:zero", "relu_1:scale=2"]],
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with a net, and two with modules that never or not always run."""
    engine = Engine(threads=1, instances=2, plan_cache=kept())
    engine.load(SPEC)
    for net in ("silent", "branching"):
        engine.load(ModelSpec(f"tinynets:{net}", item_shape=tinynets.ITEM))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[Client]:
    """A client of a server of that engine."""
    with running_server(engine) as address, Client(address) as client:
        yield client


@pytest.fixture(scope="module")
def local() -> Iterator[layertap.LocalModel]:
    """The net in this process."""
    with layertap.load(
        "gradnets:residual", item_shape=gradnets.IMAGE, input_dtype="float64", device="cpu"
    ) as model:
        yield model


@pytest.mark.parametrize("name", EVERY)
def test_a_server_gives_the_values_of_this_process(
    client: Client, local: layertap.LocalModel, name: str
) -> None:
    """Every operation goes over the wire and comes back with the same bits."""
    found = client.extract("residual", IMAGES, LAYERS, interventions=EVERY[name])
    expected = local.extract(IMAGES, LAYERS, interventions=EVERY[name]).numpy()
    assert list(found) == list(expected)
    assert list(found)[3:] == [
        f"interventions.{each}" for each in ("calls", "elements", "changed", "norm")
    ]
    for layer, value in expected.items():
        assert np.array_equal(found[layer], value, equal_nan=True)


@pytest.mark.parametrize("name", EVERY)
def test_messages_keep_everything(name: str) -> None:
    """An intervention is the same after it was a message."""
    before = parse_interventions(EVERY[name])
    after = interventions_from_proto(interventions_to_proto(before))
    assert [each.summary for each in after] == [each.summary for each in before]


def test_streams_and_asyncio_take_interventions(client: Client) -> None:
    """Each item of a stream has its own interventions, and so has a call of the asyncio client."""
    texts = ["conv2:channel=1:zero", "relu:scale=2", "relu_1:set=1"]
    requests = [StreamRequest("residual", IMAGES, LAYERS, interventions=text) for text in texts]
    with client.stream() as stream:
        outcomes = dict(stream.extract(requests))

    async def ask() -> dict[str, np.ndarray]:
        async with AsyncClient(client._targets[0]) as aio:
            return dict(await aio.extract("residual", IMAGES, LAYERS, interventions=texts[1]))

    alone = asyncio.run(ask())
    many = list(client.extract_many("residual", [IMAGES] * 2, LAYERS, interventions=texts[1]))
    for index, text in enumerate(texts):
        single = client.extract("residual", IMAGES, LAYERS, interventions=text)
        for layer in single:
            outcome = outcomes[index]
            assert not isinstance(outcome, errors.LayertapError)
            assert np.array_equal(outcome[layer], single[layer])
            assert index != 1 or np.array_equal(alone[layer], single[layer])
            assert index != 1 or np.array_equal(many[1][layer], single[layer])


def test_open_inference_takes_interventions_as_text(client: Client) -> None:
    """The parameter ``interventions`` has the texts, with semicolons between them."""
    text = "conv2:channel=1:zero; relu_1:scale=2"
    request = infer.ModelInferRequest(
        model_name="residual",
        inputs=[given("x", "FP64", IMAGES.shape)],
        raw_input_contents=[IMAGES.numpy().tobytes()],
        outputs=[output("fc")],
        parameters=parameters({"interventions": text}),
    )
    with grpc.insecure_channel(client._targets[0]) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        reply = infer.ModelInferResponse.FromString(call(request.SerializeToString(), timeout=30))
    raw = dict(zip((each.name for each in reply.outputs), reply.raw_output_contents, strict=True))
    expected = client.extract("residual", IMAGES, "fc", interventions=text.split(";"))
    assert raw["fc"] == expected["fc"].tobytes()
    assert np.frombuffer(raw["interventions.calls"], np.int64).tolist() == [1, 1]


Message = feature_service_pb2.Intervention
Along = feature_service_pb2.AxisSelection


def tensor(shape: list[int], data: bytes, dtype: str = "FLOAT32") -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=f"DATA_TYPE_{dtype}", shape=shape, data=data)


def zero(*select: Along) -> Message:
    return Message(layer="conv2", operation="OPERATION_ZERO", select=select)


def added(given: tensor_pb2.Tensor) -> Message:
    return Message(layer="conv2", operation="OPERATION_ADD", tensor=given)


NAN = np.full(4, np.nan, np.float32).tobytes()
INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION

HOSTILE: dict[str, tuple[list[Message], grpc.StatusCode]] = {
    "no operation": ([Message(layer="conv2")], INVALID),
    "an unknown operation": ([Message(layer="conv2", operation=99)], INVALID),
    "an unknown axis": ([zero(Along(axis=99, index=[0]))], INVALID),
    "no axis": ([zero(Along(index=[0]))], INVALID),
    "no index": ([zero(Along(axis="AXIS_CHANNEL"))], INVALID),
    "a million indices": ([zero(Along(axis="AXIS_CHANNEL", index=[0] * 1_000_000))], INVALID),
    "a million selections": ([zero(*[Along(axis="AXIS_CHANNEL", index=[0])] * 1_000_000)], INVALID),
    "an index out of range": ([zero(Along(axis="AXIS_CHANNEL", index=[1 << 62]))], INVALID),
    "the least index": ([zero(Along(axis="AXIS_CHANNEL", index=[-(1 << 63)]))], INVALID),
    "a range of everything": (
        [zero(Along(axis="AXIS_CHANNEL", begin=-(1 << 63), end=(1 << 63) - 1))], INVALID,
    ),
    "a step beyond the range": (
        [zero(Along(axis="AXIS_CHANNEL", begin=3, end=3, step=(1 << 32) - 1))], INVALID,
    ),
    "an item that is not there": ([zero(Along(axis="AXIS_ITEM", index=[2]))], INVALID),
    "a dimension that is not there": (
        [zero(Along(axis="AXIS_DIMENSION", dimension=1 << 31, index=[0]))], INVALID,
    ),
    "a billion heads": ([zero(Along(axis="AXIS_HEAD", heads=1 << 30, index=[0]))], INVALID),
    "two numbers of heads": (
        [zero(*(Along(axis="AXIS_HEAD", heads=n, index=[0]) for n in (2, 4)))], INVALID,
    ),
    "a gradient as the side": (
        [Message(layer="conv2", operation="OPERATION_ZERO", capture="CAPTURE_GRADIENT")], INVALID,
    ),
    "no tensor": ([Message(layer="conv2", operation="OPERATION_ADD")], INVALID),
    "a tensor for nothing": (
        [Message(layer="conv2", operation="OPERATION_ZERO", tensor=tensor([1], b"0000"))], INVALID,
    ),
    "a tensor whose bytes don't fit": ([added(tensor([1 << 40, 1 << 40], b"0000"))], INVALID),
    "a negative size": ([added(tensor([-1], b""))], INVALID),
    "whole numbers": ([added(tensor([4], b"\0" * 16, "INT32"))], INVALID),
    "NaN": ([added(tensor([4], NAN))], INVALID),
    "a tensor in shared memory": (
        [added(tensor_pb2.Tensor(shape=[4], shared=tensor_pb2.SharedSlice(region=1)))], INVALID,
    ),
    "a tensor that is too big": ([added(tensor([1 << 20], b"\0" * (1 << 22)))], INVALID),
    "NaN as the value": (
        [Message(layer="conv2", operation="OPERATION_SET", value=float("nan"))], INVALID,
    ),
    "an infinite factor": (
        [Message(layer="conv2", operation="OPERATION_SCALE", factor=float("inf"))], INVALID,
    ),
    "NaN as a limit": (
        [Message(layer="conv2", operation="OPERATION_CLAMP", low=float("nan"))], INVALID,
    ),
    "a value for a factor": (
        [Message(layer="conv2", operation="OPERATION_SCALE", value=0.5)], INVALID,
    ),
    "a factor for a value": (
        [Message(layer="conv2", operation="OPERATION_SET", factor=0.5)], INVALID,
    ),
    "a source for nothing": (
        [Message(layer="conv2", operation="OPERATION_ZERO", source_item=1)], INVALID,
    ),
    "a seed for nothing": ([Message(layer="conv2", operation="OPERATION_ZERO", seed=1)], INVALID),
    "a step without a range": ([zero(Along(axis="AXIS_CHANNEL", index=[3], step=2))], INVALID),
    "a source that is not there": (
        [Message(layer="conv2", operation="OPERATION_PATCH", source_item=1 << 30)], INVALID,
    ),
    "a set without others before it": (
        [Message(layer="conv2", operation="OPERATION_ZERO", set=2)], INVALID,
    ),
    "a huge set": ([Message(layer="conv2", operation="OPERATION_ZERO", set=1 << 31)], INVALID),
    "a layer that does not exist": ([Message(layer="nix", operation="OPERATION_ZERO")], NOT_FOUND),
    "a layer behind everything": ([Message(layer="fc", operation="OPERATION_ZERO")], INVALID),
    "too many": ([zero()] * 1025, INVALID),
    "far too many": ([zero()] * 200_000, INVALID),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_interventions_have_a_clear_status_before_any_compute(
    engine: Engine, client: Client, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """A malformed intervention is refused without a pass of the request, and the server goes on."""
    messages, expected = HOSTILE[case]
    client.extract("residual", IMAGES, "conv2", interventions="conv2:scale=2")  # The plan's trial.
    ran: list[Any] = []
    monkeypatch.setattr("layertap.engine.pipeline.compute", ran.append)
    status, message = refused(client, "conv2", messages)
    monkeypatch.undo()
    assert status is expected, message
    assert not ran
    assert message
    assert client.extract("residual", IMAGES, "conv2", interventions="conv2:scale=2")
    # The bytes of a reply are released when its call has ended, which the client may see first.
    assert until(lambda: engine.pending_bytes == 0)


def test_layers_that_never_run_have_a_clear_status(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that the model has but never calls is refused as such, before any compute."""
    ran: list[Any] = []
    monkeypatch.setattr("layertap.engine.pipeline.compute", ran.append)
    for layer in ("aux", "read"):
        message = Message(layer=layer, operation="OPERATION_ZERO")
        status, text = refused(client, "output", [message], model="silent")
        assert status is PRECONDITION, text
        assert "never runs" in text
    assert not ran


def test_layers_that_did_not_run_on_the_input_have_a_clear_status(client: Client) -> None:
    """A module that this input does not reach is an error, and the next request is served."""
    message = Message(layer="second", operation="OPERATION_ZERO")
    nan = np.full((1, *tinynets.ITEM), np.nan, np.float32)
    status, text = refused(client, "output", [message], model="branching", given=nan)
    assert status is INVALID, text
    assert "did not run on this input" in text
    found = client.extract("branching", np.zeros_like(nan), "output", interventions="second:zero")
    assert found["interventions.calls"].tolist() == [1]


def test_extractors_that_cannot_are_refused(client: Client) -> None:
    """The status of an extractor that can't apply interventions is FAILED_PRECONDITION."""
    status, message = refused(client, "conv2", [zero()], "EXTRACTOR_TORCHSCRIPT")
    assert status is PRECONDITION
    assert "HOOK" in message


def test_a_huge_reply_of_many_sets_is_refused_before_it_runs(client: Client) -> None:
    """The bytes of a reply with sets count as those of as many batches."""
    with layertap.load(
        "gradnets:residual", item_shape=gradnets.IMAGE, input_dtype="float64", device="cpu",
        limits=layertap.Limits(reply_bytes=100_000),
    ) as model:  # fmt: skip
        sets = [[f"conv1:scale={k}"] for k in range(100)]
        assert model.extract(IMAGES, "relu", interventions=sets[0])
        with pytest.raises(errors.ReplyTooLargeError):
            model.extract(IMAGES, "relu", interventions=sets)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def refused(
    client: Client,
    layer: str,
    messages: list[Message],
    extractor: str = "EXTRACTOR_AUTO",
    *,
    model: str = "residual",
    given: np.ndarray | None = None,
) -> tuple[grpc.StatusCode, str]:
    request = feature_service_pb2.ExtractRequest(
        model=model,
        layers=[feature_service_pb2.LayerSelection(layer=layer)],
        extractor=extractor,
        interventions=messages,
    )
    given = IMAGES.numpy() if given is None else given
    request.inputs.add(
        dtype=f"DATA_TYPE_{given.dtype.name.upper()}", shape=given.shape, data=given.tobytes()
    )
    with grpc.insecure_channel(client._targets[0]) as channel:
        extract = channel.unary_unary("/layertap.v1.FeatureService/Extract")
        with pytest.raises(grpc.RpcError) as raised:
            extract(request.SerializeToString(), timeout=30)
    return raised.value.code(), raised.value.details()


def test_plain_gradient_and_intervention_requests_at_once(client: Client) -> None:
    """On eight threads each reply has the bits that it has alone."""
    asks: list[dict[str, Any]] = [
        {"extractor": "hook"},
        {"interventions": "conv1:channel=2:scale=-3"},
        {"interventions": [["relu:set=1"], ["relu_1:item=0:zero"]]},
        {"objective": "fc[maximum]", "layers": ["conv1:gradient", "fc"]},
        {"objective": "fc[1]", "layers": ["conv1:gradient"], "interventions": "relu:scale=2"},
    ]
    batches = [IMAGES * (1 + index) for index in range(4)]

    def ask(kind: int, which: int) -> dict[str, np.ndarray]:
        given = {"layers": LAYERS, **asks[kind]}
        layers = given.pop("layers")
        return {
            n: v.copy()
            for n, v in client.extract("residual", batches[which], layers, **given).items()
        }

    alone = {(k, w): ask(k, w) for k in range(len(asks)) for w in range(len(batches))}

    def work(thread: int) -> int:
        wrong = 0
        for turn in range(40):
            kind, which = (thread + turn) % len(asks), (thread * 3 + turn) % len(batches)
            reply = ask(kind, which)
            for name, value in alone[kind, which].items():
                wrong += not np.array_equal(reply[name], value)
        return wrong

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(work, range(8))) == 0


def test_the_wire_has_a_name_for_every_operation_and_axis() -> None:
    """The protocol's enums and the Python ones have the same members."""
    for kind, enum in (
        (layertap.Operation, feature_service_pb2.Operation),
        (layertap.Axis, feature_service_pb2.Axis),
    ):
        prefix = kind.__name__.upper()
        wire = {name.removeprefix(f"{prefix}_") for name in enum.keys()}  # noqa: SIM118
        assert wire == {member.name for member in kind} | {"UNSPECIFIED"}
