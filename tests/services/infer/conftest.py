"""A real server with tiny nets and resnet18, and a stub from the protocol's own generator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from kept import kept
from layertap.app.server import FeatureServer
from layertap.engine import Engine, Limits
from layertap.models import ModelSpec
from layertap.selection import LayerSelection
from layertap.shm.client_regions import ClientRegions
from serving import started_server
from streams import Counting
from stubs import inference_stub
from tinynets import ITEM

LIMITS = Limits(
    request_bytes=8 << 20, reply_bytes=4 << 20, batch=64, pixels=1 << 20, layers=40, streams=4
)


@pytest.fixture(scope="package")
def engine() -> Iterator[Engine]:
    """An engine with nets that declare layers, and nets that don't."""
    engine = Engine(LIMITS, plan_cache=kept())
    engine.load(
        ModelSpec("tinynets:residual", item_shape=ITEM),
        (LayerSelection("layer1"), LayerSelection.parse("avgpool:input=before")),
    )
    for name in ("dynamic", "raises", "tokens", "containers"):
        engine.load(ModelSpec(f"tinynets:{name}", item_shape=ITEM))
    engine.load(ModelSpec("resnet18", weights="random", item_shape=(3, 64, 64)))
    engine.expect([*(host.model.name for host in engine.hosts()), "coming"])
    yield engine
    engine.close()


@pytest.fixture(scope="package")
def seen() -> Counting:
    """The observer of the server."""
    return Counting()


@pytest.fixture(scope="package")
def regions() -> ClientRegions:
    """The shared memory of the server's clients."""
    return ClientRegions()


@pytest.fixture(scope="package")
def server(engine: Engine, seen: Counting, regions: ClientRegions) -> Iterator[FeatureServer]:
    """A server that accepts shared memory."""
    with started_server(engine, seen, client_regions=regions) as server:
        yield server


@pytest.fixture(scope="package")
def channel(server: FeatureServer) -> Iterator[grpc.Channel]:
    """A channel to the server."""
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="package")
def stub(channel: grpc.Channel) -> Any:
    """A stub of the service."""
    return inference_stub(channel)
