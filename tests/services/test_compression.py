"""Replies are compressed for calls that request it, and for no others."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from kept import kept
from layertap import Client, errors
from layertap.engine import Engine
from layertap.models import ModelSpec
from layertap.v1 import feature_service_pb2, tensor_pb2
from layertap.wire.messages import REPLY_COMPRESSION_KEY
from relay import Counting
from serving import started_server
from tinynets import ITEM

X = np.zeros((64, *ITEM), np.float32)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A real server of a small net."""
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    with started_server(engine) as server:
        yield server.address
    engine.close()


@pytest.fixture
def relay(address: str) -> Iterator[Counting]:
    relay = Counting(address)
    yield relay
    relay.close()


def request() -> bytes:
    return feature_service_pb2.ExtractRequest(
        model="residual",
        inputs=[tensor_pb2.Tensor(dtype=1, shape=X.shape, data=X.tobytes())],
        layers=[feature_service_pb2.LayerSelection(layer="layer1")],
        extractor="EXTRACTOR_HOOK",
    ).SerializeToString()


@pytest.mark.parametrize(("asked", "small"), [("none", False), ("gzip", True), ("deflate", True)])
def test_the_client_chooses(relay: Counting, asked: str, small: bool) -> None:
    """Values are the same, and fewer bytes are sent if compression was requested."""
    with Client(relay.address, shared_memory=False, reply_compression=asked) as client:
        got = client.extract("residual", X, "layer1", extractor="hook")["layer1"]
        one = relay.received
        many = list(client.extract_many("residual", [X] * 3, "layer1", extractor="hook"))
        streamed = relay.received - one
    # All items are equal and so are many of their values.
    assert (one < got.nbytes / 4) == small
    assert (streamed < 3 * got.nbytes / 4) == small
    for each in many:
        np.testing.assert_array_equal(each["layer1"], got)


def test_any_grpc_client_may_ask(relay: Counting) -> None:
    """Setting the metadata is enough; without it nothing is compressed."""
    with grpc.insecure_channel(relay.address, [("grpc.max_receive_message_length", -1)]) as channel:
        method = channel.unary_unary("/layertap.v1.FeatureService/Extract")
        plain = method(request(), timeout=30)
        sent = relay.received
        small = method(request(), timeout=30, metadata=[(REPLY_COMPRESSION_KEY, "gzip")])
        assert relay.received - sent < sent / 4
    ours = feature_service_pb2.ExtractResponse
    assert ours.FromString(small).tensors == ours.FromString(plain).tensors


def test_unknown_algorithms_are_refused(address: str) -> None:
    """The server refuses them, and so does the client before anything is sent."""
    with grpc.insecure_channel(address) as channel:
        method = channel.unary_unary("/layertap.v1.FeatureService/ListModels")
        with pytest.raises(grpc.RpcError) as caught:
            method(b"", timeout=30, metadata=[(REPLY_COMPRESSION_KEY, "zstd")])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "got 'zstd', expected one of none, gzip, deflate" in caught.value.details()
    with pytest.raises(errors.InvalidInputError, match="reply_compression: got 'zstd'"):
        Client(address, reply_compression="zstd")
