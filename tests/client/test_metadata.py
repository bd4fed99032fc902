"""A client's own metadata reaches the server with every call."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from layertap import AsyncClient, Client
from layertap.app.server import FeatureServer, ServerOptions
from layertap.engine import Engine
from layertap.errors import InvalidInputError
from layertap.models import ModelSpec
from tinynets import ITEM

GIVEN = {"application": "vision", "x-tenant": "a b"}


class Recorder(grpc.ServerInterceptor):
    """Records which methods were called with the metadata of the client."""

    def __init__(self) -> None:
        self.methods: list[str] = []

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        if dict(details.invocation_metadata).items() >= GIVEN.items():
            self.methods.append(details.method.rpartition("/")[2])
        return continuation(details)


@pytest.fixture
def recorded() -> Iterator[tuple[str, list[str]]]:
    """A server's address, and the methods that were called with the metadata."""
    engine, recorder = Engine(), Recorder()
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    server = FeatureServer(engine, ServerOptions(port=0), interceptors=(recorder,))
    server.start()
    server.ready()
    yield server.address, recorder.methods
    server.stop(0)
    engine.close()


def test_every_call_has_it(recorded: tuple[str, list[str]]) -> None:
    """Unary calls, streams and health checks of both clients have it; a pickled client keeps it."""
    address, methods = recorded
    x = np.zeros((1, *ITEM), np.float32)
    expected = ["Check", "ListModels", "Extract", "ExtractStream"]
    with Client(address, metadata=GIVEN, reply_compression="gzip", shared_memory=False) as client:
        for each in (client, pickle.loads(pickle.dumps(client))):
            with each:
                each.wait_ready(10)
                each.list_models()
                each.extract("residual", x, "fc")
                list(each.extract_many("residual", [x], "fc"))
            assert methods == expected
            methods.clear()

    async def ask() -> None:
        async with AsyncClient(address, metadata=GIVEN, shared_memory=False) as client:
            await client.wait_ready(10)
            await client.list_models()
            await client.extract("residual", x, "fc")
            [each async for each in client.extract_many("residual", [x], "fc")]

    asyncio.run(ask())
    assert methods == expected


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"Application": "a"}, "the name 'Application'"),
        ({"grpc-timeout": "1S"}, "the name 'grpc-timeout'"),
        ({"a-bin": "x"}, "the name 'a-bin'"),
        ({"a b": "x"}, "the name 'a b'"),
        ({"a": "é"}, "another value of 'a', expected printable ASCII"),
        ({"a": "x\n"}, "another value of 'a'"),
        ({"authorization": "Bearer x"}, "expected it as token or token_file"),
        ({"layertap-reply-compression": "gzip"}, "expected it as reply_compression"),
    ],
)
def test_what_is_refused(metadata: dict[str, str], match: str) -> None:
    """A name or value that gRPC would refuse, and what has an argument of its own."""
    with pytest.raises(InvalidInputError, match=match):
        Client("127.0.0.1:1", metadata=metadata)
