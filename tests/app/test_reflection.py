"""Open reflection calls take no thread from extractions."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kept import kept
from layertap import Client
from layertap.app.reflection import REFLECTIONS
from layertap.app.server import FeatureServer
from layertap.engine import Engine, Limits
from serving import started_server

Request = reflection_pb2.ServerReflectionRequest


@pytest.fixture
def server() -> Iterator[FeatureServer]:
    """A server that admits few requests, without a model."""
    engine = Engine(Limits(pending=2, streams=2), plan_cache=kept())
    with started_server(engine) as server:
        yield server
    engine.close()


def test_calls_that_stay_open_are_bounded(server) -> None:
    """With any number of open calls, some are served and the others are refused at once."""
    left = threading.Event()

    def asking() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield Request(list_services="")
        left.wait()

    with grpc.insecure_channel(server.address) as channel, Client(server.address) as client:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        calls = [stub.ServerReflectionInfo(asking()) for _ in range(server._workers.count)]
        outcomes = [outcome(call) for call in calls]
        assert outcomes.count("OK") == REFLECTIONS
        assert outcomes.count("RESOURCE_EXHAUSTED") == len(calls) - REFLECTIONS
        assert client.list_models(timeout=10) == []
        left.set()
        for call in calls:
            call.cancel()
        ends = time.monotonic() + 30
        while outcome(stub.ServerReflectionInfo(asking())) != "OK":
            assert time.monotonic() < ends


def outcome(call: grpc.Call) -> str:
    try:
        next(call)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def ask(address: str, request: reflection_pb2.ServerReflectionRequest, version: str = "v1alpha"):
    """Send one request with gRPC's own messages."""
    with grpc.insecure_channel(address) as channel:
        method = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=Request.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        (reply,) = method(iter([request]), timeout=30)
    assert reply.original_request == request
    return reply


def names(reply: reflection_pb2.ServerReflectionResponse) -> set[str]:
    files = reply.file_descriptor_response.file_descriptor_proto
    return {FileDescriptorProto.FromString(each).name for each in files}


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
@pytest.mark.parametrize(
    ("symbol", "file"),
    [
        ("layertap.v1.FeatureService", "layertap/v1/feature_service.proto"),
        ("layertap.v1.FeatureService.Extract", "layertap/v1/feature_service.proto"),
        ("layertap.v1.ExtractRequest", "layertap/v1/feature_service.proto"),
        ("inference.GRPCInferenceService.ModelInfer", "inference/grpc_service.proto"),
        ("grpc.health.v1.Health.Check", "grpc/health/v1/health.proto"),
        ("grpc.reflection.v1.ServerReflection", "grpc/reflection/v1/reflection.proto"),
    ],
)
def test_symbols_are_found(server, version: str, symbol: str, file: str) -> None:
    """Services, methods and messages are found, each with everything that its file imports."""
    found = names(ask(server.address, Request(file_containing_symbol=symbol), version))
    assert file in found
    assert ("layertap/v1/tensor.proto" in found) == file.startswith("layertap/v1/feature")


def test_all_services_are_listed(server) -> None:
    """Both names of the reflection service are among them."""
    reply = ask(server.address, Request(list_services=""))
    listed = [each.name for each in reply.list_services_response.service]
    assert {"grpc.reflection.v1.ServerReflection", "grpc.health.v1.Health"} <= set(listed)
    assert listed == sorted(set(listed))


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Request(file_containing_symbol="layertap.v1.FeatureService.Nothing"), 5),
        (Request(file_containing_symbol=""), 5),
        (Request(file_by_filename="nothing.proto"), 5),
        (
            Request(
                file_containing_extension=reflection_pb2.ExtensionRequest(
                    containing_type="layertap.v1.ExtractRequest", extension_number=7
                )
            ),
            5,
        ),
        (Request(all_extension_numbers_of_type="no.such.Type"), 5),
        (Request(), 3),
    ],
)
def test_what_does_not_exist_is_an_error(server, request_, code: int) -> None:
    """NOT_FOUND for an unknown name, INVALID_ARGUMENT for an empty request."""
    assert ask(server.address, request_).error_response.error_code == code


def test_a_type_without_extensions_has_none(server) -> None:
    """The result is an empty list, not an error."""
    request = Request(all_extension_numbers_of_type="layertap.v1.ExtractRequest")
    reply = ask(server.address, request)
    assert reply.WhichOneof("message_response") == "all_extension_numbers_response"
    assert list(reply.all_extension_numbers_response.extension_number) == []


def test_a_file_is_found_by_its_name(server) -> None:
    """The answer includes everything that the file imports."""
    reply = ask(server.address, Request(file_by_filename="layertap/v1/catalogue.proto"))
    assert names(reply) == {"layertap/v1/catalogue.proto", "layertap/v1/tensor.proto"}
