"""Inference over a real channel gives the native protocol's values, and refuses bad requests."""

from __future__ import annotations

import io
from pathlib import Path

import grpc
import ml_dtypes
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

from infering import arrays, batch, bytes_tensor, given, output, parameters, raw_request
from layertap import Client, Extractor, LayerSelection, Reduction
from layertap.inference import grpc_service_pb2 as pb

PHOTO = Path(__file__).parents[3] / "examples" / "images" / "grace_hopper.jpg"
NAME = "inference.GRPCInferenceService"
Code = grpc.StatusCode


@pytest.fixture
def client(server) -> object:
    """A native client of the same server."""
    with Client(server.address) as client:
        yield client


@pytest.fixture(autouse=True)
def _server_unharmed(stub) -> object:
    """After each test, whatever it sent, the server answers correctly."""
    yield
    assert arrays(stub.ModelInfer(raw_request()))["layer1"].shape == (1, 8, 8, 8)


def refusal(stub, request: pb.ModelInferRequest) -> tuple[Code, str]:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request, timeout=30)
    return caught.value.code(), caught.value.details()


def test_outputs_are_those_of_the_native_protocol(stub, client) -> None:
    """Several layers of a batch have the same bits as in the native reply."""
    x = batch(3)
    names = ["layer1", "conv1", "avgpool:input", "fc"]
    response = stub.ModelInfer(raw_request(x, *map(output, names), id="seven"))
    features = client.extract("residual", x, names, extractor="hook")
    got = arrays(response)
    assert list(got) == names
    for name in names:
        assert np.array_equal(got[name], features[name])
    assert (response.id, response.model_version) == ("seven", "1")
    assert response.parameters["extractor"].string_param == features.extractor
    assert response.parameters["total_ms"].double_param > 0


def test_output_parameters_are_the_native_selection(stub, client) -> None:
    """Capture, reduction, dtype and layer work as in a selection; both names of a dtype do."""
    x = batch(2)
    response = stub.ModelInfer(
        raw_request(
            x,
            output("avgpool", capture="input"),
            output("pooled", layer="layer1", reduction="global_average_pool", dtype="FP16"),
            output("half", layer="layer1", dtype="bfloat16", extractor="hook"),
        )
    )
    features = client.extract(
        "residual",
        x,
        [
            "avgpool:input",
            LayerSelection(
                "layer1",
                alias="pooled",
                reduction=Reduction.GLOBAL_AVERAGE_POOL,
                dtype="float16",
            ),
            "layer1",
        ],
        extractor=Extractor.HOOK,
    )
    got = arrays(response)
    assert np.array_equal(got["avgpool"], features["avgpool:input"])
    assert np.array_equal(got["pooled"], features["pooled"])
    assert got["half"].dtype == ml_dtypes.bfloat16
    assert np.array_equal(got["half"], features["layer1"].astype(ml_dtypes.bfloat16))
    assert response.parameters["extractor"].string_param == "hook"


def test_a_request_that_names_no_outputs_gets_the_declared_layers(stub, client) -> None:
    """They are returned under their aliases, which requests may also name."""
    x = batch()
    request = raw_request(x)
    del request.outputs[:]
    got = arrays(stub.ModelInfer(request))
    assert list(got) == ["layer1", "before"]
    features = client.extract("residual", x, ["layer1", "avgpool:input"], extractor="hook")
    assert np.array_equal(got["before"], features["avgpool:input"])
    alone = arrays(stub.ModelInfer(raw_request(x, output("before"))))
    assert np.array_equal(alone["before"], got["before"])


def test_without_declared_layers_the_last_one_is_sent(stub, client) -> None:
    """It is the last module that runs."""
    request = raw_request(model_name="tokens")
    del request.outputs[:]
    (name,) = arrays(stub.ModelInfer(request))
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="tokens"))
    assert [each.name for each in metadata.outputs] == [name]


def test_typed_contents_give_the_same_answer(stub) -> None:
    """Typed contents give the same answer as raw contents."""
    x = batch(2)
    typed = given(
        "input", "FP32", x.shape, contents=pb.InferTensorContents(fp32_contents=x.ravel())
    )
    request = raw_request(x, inputs=[typed], raw_input_contents=[])
    assert np.array_equal(
        arrays(stub.ModelInfer(request))["layer1"],
        arrays(stub.ModelInfer(raw_request(x)))["layer1"],
    )


def test_a_photograph_is_preprocessed_as_in_the_native_protocol(stub, client) -> None:
    """Encoded images, raw or typed, one or several, give the same values."""
    photo = PHOTO.read_bytes()
    small = io.BytesIO()
    Image.open(PHOTO).resize((300, 260)).save(small, "PNG")
    photos = [photo, small.getvalue()]
    raw = pb.ModelInferRequest(
        model_name="resnet18",
        inputs=[given("images", "BYTES", [2])],
        outputs=[output("avgpool", extractor="hook")],
        raw_input_contents=[bytes_tensor(*photos)],
    )
    contents = pb.InferTensorContents(bytes_contents=photos)
    typed = pb.ModelInferRequest(
        model_name="resnet18",
        inputs=[given("images", "BYTES", [2], contents=contents)],
        outputs=[output("avgpool", extractor="hook")],
    )
    expected = client.extract("resnet18", photos, "avgpool", extractor="hook")["avgpool"]
    assert np.array_equal(arrays(stub.ModelInfer(raw))["avgpool"], expected)
    assert np.array_equal(arrays(stub.ModelInfer(typed))["avgpool"], expected)


def test_values_whose_shape_depends_on_the_content_are_sent(stub, client) -> None:
    """A dynamic model's reply is laid out from the actual values."""
    for size in (1, 2, 7):
        x = batch(size, seed=size)
        request = raw_request(x, output("score"), output("pick"), model_name="dynamic")
        got = arrays(stub.ModelInfer(request))
        features = client.extract("dynamic", x, ["score", "pick"], extractor="hook")
        assert np.array_equal(got["score"], features["score"])
        assert np.array_equal(got["pick"], features["pick"])


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"model_name": "nope"}, Code.NOT_FOUND, "Request for unknown model: 'nope' is not found"),
        ({"model_version": "2"}, Code.NOT_FOUND, "Request for unknown model: 'residual' is not"),
        ({"model_name": "coming"}, Code.UNAVAILABLE, "model 'coming' is not ready"),
        ({"outputs": [output("layer7")]}, Code.NOT_FOUND, "no layer 'layer7'; did you mean"),
        (
            {"outputs": [output("layer1"), output("layer1")]},
            Code.INVALID_ARGUMENT,
            "two outputs are called 'layer1'",
        ),
        ({"outputs": [output("layer*")]}, Code.INVALID_ARGUMENT, "got a glob, expected one layer"),
        (
            {"outputs": [output("layer1", capture="both")]},
            Code.INVALID_ARGUMENT,
            "capture: got 'both', expected one of OUTPUT, INPUT",
        ),
        (
            {"outputs": [output("layer1", dtype="INT8")]},
            Code.INVALID_ARGUMENT,
            "dtype: got int8, expected float32, float16 or bfloat16",
        ),
        (
            {"outputs": [output("layer1", reduction=3)]},
            Code.INVALID_ARGUMENT,
            "parameter 'reduction': got int64_param, expected a string",
        ),
        (
            {"outputs": [output("layer1", classification=3)]},
            Code.INVALID_ARGUMENT,
            "classification is not supported",
        ),
        (
            {"outputs": [output("layer1", captrue="input")]},
            Code.INVALID_ARGUMENT,
            "parameter 'captrue' is not known, expected layer, capture",
        ),
        (
            {"outputs": [output("layer1", extractor="fx"), output("conv1", extractor="hook")]},
            Code.INVALID_ARGUMENT,
            "extractor: got fx, hook, expected one for all outputs",
        ),
        (
            {"outputs": [output(f"l{n}") for n in range(41)]},
            Code.INVALID_ARGUMENT,
            "outputs: got 41, expected at most 40",
        ),
        (
            {"parameters": parameters({"sequence_id": 5})},
            Code.INVALID_ARGUMENT,
            "sequences are not supported",
        ),
        (
            {"parameters": parameters({"timeout": -1})},
            Code.INVALID_ARGUMENT,
            "timeout: got -1, expected microseconds",
        ),
        (
            {"parameters": parameters({"extractor": "best"})},
            Code.INVALID_ARGUMENT,
            "extractor: got 'best', expected one of AUTO",
        ),
        (
            {
                "model_name": "raises",
                "outputs": [output("head")],
                "raw_input_contents": [np.full((1, 3, 16, 16), 1e6, np.float32).tobytes()],
            },
            Code.INTERNAL,
            "model 'raises' failed on this input (RuntimeError)",
        ),
    ],
)
def test_bad_requests_are_refused(stub, changes: dict, code: Code, text: str) -> None:
    """Each has the status from the one table, and a text that says what was got."""
    got_code, got_text = refusal(stub, raw_request(**changes))
    assert got_code == code, got_text
    assert text in got_text


def test_what_clients_send_unasked_is_taken(stub) -> None:
    """Priorities, sequence flags and Triton's own keys have no effect."""
    given_ = {"priority": 0, "sequence_start": False, "triton_enable_empty_final_response": True}
    request = raw_request(parameters=parameters({**given_, "sequence_id": 0, "timeout": 10**9}))
    assert list(arrays(stub.ModelInfer(request))) == ["layer1"]


def test_its_own_timeout_ends_a_request(stub) -> None:
    """The timeout of a microsecond passes before the model runs."""
    request = raw_request(parameters=parameters({"timeout": 1}))
    assert refusal(stub, request)[0] == Code.DEADLINE_EXCEEDED


def test_a_reply_over_the_limit_is_refused_before_any_compute(stub) -> None:
    """Six items of resnet18's layer1 are larger than 4 MiB."""
    x = np.zeros((6, 3, 224, 224), np.float32)
    request = raw_request(x, output("layer1"), model_name="resnet18")
    code, text = refusal(stub, request)
    assert (code, "predicted, limit 4194304" in text) == (Code.OUT_OF_RANGE, True)


def test_bytes_that_are_no_request_are_refused(channel) -> None:
    """Every method returns INVALID_ARGUMENT for a malformed message, and leaks nothing."""
    methods = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    needs_no_parse = {"ModelStreamInfer"}
    assert len(methods) == 20
    for name in set(methods) - needs_no_parse:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/{NAME}/{name}")(b"\x0a\xff", timeout=30)
        # Load and unload are the owner's, so nobody else's bytes are read.
        owners = name in {"RepositoryModelLoad", "RepositoryModelUnload"}
        assert caught.value.code() == (Code.PERMISSION_DENIED if owners else Code.INVALID_ARGUMENT)


def test_the_observer_is_told(stub, seen) -> None:
    """Answers and refusals are counted as in the native protocol."""
    before = dict(seen.ends)
    stub.ModelInfer(raw_request())
    refusal(stub, raw_request(model_name="nope"))
    refusal(stub, raw_request(None, output("layer7")))
    assert seen.ends["residual OK"] == before["residual OK"] + 1
    assert seen.ends[" NOT_FOUND"] == before.get(" NOT_FOUND", 0) + 1
    assert seen.ends["residual NOT_FOUND"] == before.get("residual NOT_FOUND", 0) + 1


def test_health_and_reflection_list_the_service(channel) -> None:
    """It has its own health status, and reflection lists and describes it."""
    health = health_pb2_grpc.HealthStub(channel)
    status = health.Check(health_pb2.HealthCheckRequest(service=NAME)).status
    assert status == health_pb2.HealthCheckResponse.SERVING
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=NAME),
    ]
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    listed, described = stub.ServerReflectionInfo(iter(asked))
    assert NAME in {each.name for each in listed.list_services_response.service}
    assert described.file_descriptor_response.file_descriptor_proto


def test_a_variant_is_named_in_a_parameter(stub, client) -> None:
    """The response names it, and has the bits of the native reply; an unknown one is refused."""
    x = batch(2)
    named = {"extractor": "torchscript", "variant": "channels_last"}
    request = raw_request(x, output("layer1"))
    for name, parameter in parameters(named).items():
        request.parameters[name].CopyFrom(parameter)
    response = stub.ModelInfer(request)
    features = client.extract("residual", x, "layer1", **named)
    assert features.variant == "channels_last"
    assert np.array_equal(arrays(response)["layer1"], features["layer1"])
    assert {name: response.parameters[name].string_param for name in named} == named
    request.parameters["variant"].string_param = "sideways"
    code, details = refusal(stub, request)
    assert code is Code.INVALID_ARGUMENT
    assert "variant: got 'sideways', expected none or 'channels_last'" in details
    assert "variant" not in stub.ModelInfer(raw_request(x, output("layer1"))).parameters
