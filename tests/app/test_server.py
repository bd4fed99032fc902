"""The server answers health and reflection from its start, and stops in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from kept import kept
from layertap import Client, errors
from layertap.app.server import FeatureServer, ServerOptions
from layertap.engine import Engine, Limits
from layertap.models import ModelSpec
from tinynets import ITEM

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
ONE = np.zeros((1, *ITEM), np.float32)
ONE_SECOND = np.full((1, 3, 4, 4), 1000, np.float32)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine with a fast and a slow net, and room for few requests."""
    engine = Engine(Limits(request_bytes=100_000, pending=2), plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    engine.load(ModelSpec("slownets:sleepy", item_shape=(3, 4, 4)))
    yield engine
    engine.close()


@pytest.fixture
def server(engine: Engine) -> Iterator[FeatureServer]:
    """A started server that is not ready yet."""
    server = FeatureServer(engine, ServerOptions(port=0))
    server.start()
    yield server
    server.stop(0)


def health(address: str, service: str = "") -> int:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=30).status


def test_health_follows_the_life_cycle(server) -> None:
    """The server, its service and each model are NOT_SERVING until ready."""
    names = ("", "layertap.v1.FeatureService", "residual", "sleepy")
    assert {health(server.address, name) for name in names} == {NOT_SERVING}
    server.ready()
    assert {health(server.address, name) for name in names} == {SERVING}


def test_health_does_not_know_other_models(server) -> None:
    """The health of a model that is not served is NOT_FOUND."""
    with pytest.raises(grpc.RpcError) as refusal:
        health(server.address, "nobody")
    assert refusal.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_describes_the_service(server) -> None:
    """A client without the .proto files finds the service, its methods and their messages."""
    with grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "layertap.v1.FeatureService" in database.get_services()
        service = DescriptorPool(database).FindServiceByName("layertap.v1.FeatureService")
        methods = [method.name for method in service.methods]
        assert methods == ["Extract", "ExtractStream", "ListModels", "DescribeModel"]


def test_a_request_over_the_receive_limit_is_refused(server) -> None:
    """A message over the limit never reaches the engine, and the server keeps serving."""
    server.ready()
    with Client(server.address) as client:
        with pytest.raises(errors.InvalidInputError, match="larger than the server accepts"):
            client.extract("residual", np.zeros((64, *ITEM), np.float32), "layer1")
        assert client.extract("residual", ONE, "layer1")


def test_one_request_more_than_fit_the_queue_is_refused_at_once(server) -> None:
    """A full queue refuses with the limit in the text; admitted requests are answered."""
    server.ready()
    outcomes: list[str] = []

    def ask(_: int) -> None:
        try:
            client.extract("sleepy", ONE_SECOND, "conv")
            outcomes.append("served")
        except errors.OverloadedError as error:
            outcomes.append(str(error))

    with Client(server.address) as client:
        client.extract("sleepy", ONE_SECOND, "conv")
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(ask, range(6)))
    refused = [outcome for outcome in outcomes if outcome != "served"]
    assert len(outcomes) - len(refused) >= 2
    assert refused
    assert all("2 requests are waiting" in text for text in refused)


def test_stopping_answers_what_was_admitted(server, engine) -> None:
    """When the server stops, a running request is answered within the grace; later ones are not."""
    server.ready()
    replies: list[object] = []
    with Client(server.address) as client:
        client.extract("sleepy", ONE_SECOND, "conv")

        def ask() -> None:
            replies.append(client.extract("sleepy", ONE_SECOND, "conv"))

        caller = threading.Thread(target=ask)
        caller.start()
        while not engine.pending:
            time.sleep(0.005)
        server.stop(grace=60)
        caller.join()
        assert len(replies) == 1
        with pytest.raises(errors.UnavailableError):
            client.extract("residual", ONE, "layer1", timeout=5)


def test_a_taken_port_is_an_error(server, engine) -> None:
    """A second server on the same port is refused, instead of getting half of the calls."""
    port = int(server.address.rsplit(":", 1)[1])
    with pytest.raises(errors.UnavailableError, match=str(port)):
        FeatureServer(engine, ServerOptions(port=port))
