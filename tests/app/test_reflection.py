"""Reflection that is left open takes no thread from those who extract."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from layertap import Client
from layertap.app.reflection import REFLECTIONS
from layertap.app.server import FeatureServer, ServerOptions
from layertap.engine import Engine, Limits

Request = reflection_pb2.ServerReflectionRequest


@pytest.fixture
def server() -> Iterator[FeatureServer]:
    """A server that admits few requests, without a model."""
    engine = Engine(Limits(pending=2, streams=2))
    server = FeatureServer(engine, ServerOptions(port=0))
    server.start()
    server.ready()
    yield server
    server.stop(0)
    engine.close()


def test_calls_that_stay_open_are_bounded(server) -> None:
    """However many ask and leave their calls open, some are served, the rest refused at once."""
    left = threading.Event()

    def asking() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield Request(list_services="")
        left.wait()

    with grpc.insecure_channel(server.address) as channel, Client(server.address) as client:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        calls = [stub.ServerReflectionInfo(asking()) for _ in range(server._workers._max_workers)]
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
