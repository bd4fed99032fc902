"""Bytes counted for requests and replies return to zero, without a garbage collector.

``LAYERTAP_STREAM_ITEMS`` is the length of the long streams: a few hundred items here, 100,000 with
``LAYERTAP_STREAM_ITEMS=100000 pytest --timeout 3600 tests/services/test_reservations.py -k long``.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import grpc
import numpy as np
import pytest

from gatednets import gate
from infering import raw_request
from kept import kept
from layertap.app.server import FeatureServer, ServerOptions
from layertap.engine import Engine, Limits
from layertap.inference import grpc_service_pb2 as pb
from layertap.models import ModelSpec
from layertap.v1 import feature_service_pb2
from processes import ENVIRONMENT
from streams import GATED_ITEM, Counting, RawStream, eventually, held_item, item
from stubs import feature_stub
from tinynets import ITEM

Code = grpc.StatusCode
ITEMS = int(os.environ.get("LAYERTAP_STREAM_ITEMS", "400"))
INFER = "/inference.GRPCInferenceService/"
# One item's messages: 3 * 16 * 16 values of input, 8 * 8 * 8 of output, and what is around them.
REQUEST_BYTES, REPLY_BYTES = 3072, 2048
AROUND = 400


@contextmanager
def serving(pending_bytes: int, instances: int = 1) -> Iterator[tuple[FeatureServer, Engine]]:
    """Serve two nets within a budget of bytes; the garbage collector is off."""
    engine = Engine(
        Limits(pending_bytes=pending_bytes, batch=8192),
        threads=1,
        instances=instances,
        plan_cache=kept(),
    )
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    engine.load(ModelSpec("gatednets:gated", item_shape=GATED_ITEM))
    server = FeatureServer(engine, ServerOptions(port=0, shared_memory_bytes=0), Counting())
    server.start()
    server.ready()
    gc.collect()
    gc.disable()
    try:
        yield server, engine
    finally:
        gc.enable()
        server.stop(0)
        engine.close()


def wide(number: int) -> object:
    """Return an item of 512 images (1.5 MiB) whose reply has 1 MiB."""
    return item(number, np.zeros((512, *ITEM), np.float32))


class InferStream:
    """One stream of the Open Inference Protocol."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._outgoing: SimpleQueue[pb.ModelInferRequest | None] = SimpleQueue()
        self.replies = channel.stream_stream(
            f"{INFER}ModelStreamInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )(iter(self._outgoing.get, None))

    def ask(self, request: pb.ModelInferRequest) -> pb.ModelStreamInferResponse:
        self._outgoing.put(request)
        return next(self.replies)

    def close(self) -> None:
        self._outgoing.put(None)
        assert list(self.replies) == []


@pytest.mark.timeout(3600 if ITEMS > 5000 else 120)
@pytest.mark.parametrize("protocol", ["native", "infer"])
def test_a_long_stream_with_one_item_in_flight_is_never_refused(protocol: str) -> None:
    """There is room for three: if one item in a hundred stayed counted, some would be refused."""
    room = 3 * (REQUEST_BYTES + REPLY_BYTES + 2 * AROUND)
    refused = 0
    with serving(room) as (server, engine), grpc.insecure_channel(server.address) as channel:
        if protocol == "native":
            stream = RawStream(channel, timeout=None)
            for number in range(ITEMS):
                stream.send(item(number))
                refused += stream.read().HasField("error")
            stream.half_close()
            assert stream.failure() is Code.OK
        else:
            infer, request = InferStream(channel), raw_request()
            for _ in range(ITEMS):
                refused += bool(infer.ask(request).error_message)
            infer.close()
        assert refused == 0
        eventually(lambda: engine.pending_bytes == 0)


def test_a_reply_counts_until_its_client_has_read_it() -> None:
    """Replies that wait for a client that doesn't read are counted, and nothing else is."""
    # A window of 64 KB: gRPC takes none of the replies before it is read.
    options = [("grpc.http2.bdp_probe", 0)]
    with (
        serving(1 << 30) as (server, engine),
        grpc.insecure_channel(server.address, options=options) as channel,
    ):
        stream = RawStream(channel)
        stream.send(*(wide(number) for number in range(3)))
        reply_bytes = 512 * REPLY_BYTES
        eventually(lambda: 0 <= engine.pending_bytes - 3 * reply_bytes < 3 * AROUND)
        assert not any(stream.read().HasField("error") for _ in range(3))
        eventually(lambda: engine.pending_bytes == 0)
        stream.half_close()


CALLER = """
import sys
import numpy as np
from layertap import Client
with Client(sys.argv[1], shared_memory=False) as client:
    x = np.zeros((8192, 3, 16, 16), np.float32)
    print(client.extract("residual", x, "layer1", extractor="hook")["layer1"].shape[0], flush=True)
"""


def test_a_unary_reply_counts_until_it_was_sent() -> None:
    """While the client is stopped, all 16 MiB of its reply count, until it continues."""
    with serving(1 << 30) as (server, engine):
        reached, go_on = threading.Event(), threading.Event()

        def hold(*_: object) -> None:
            reached.set()
            assert go_on.wait(60)

        engine.host("residual").model.module.register_forward_pre_hook(hold)
        with subprocess.Popen(
            [sys.executable, "-c", CALLER, server.address],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            text=True,
        ) as caller:
            try:
                assert reached.wait(60)
                caller.send_signal(signal.SIGSTOP)
                go_on.set()
                eventually(lambda: engine.pending == 0)
                reply_bytes = 8192 * REPLY_BYTES
                # The handler returns a moment after the pass; then only the reply is left.
                eventually(lambda: engine.pending_bytes < reply_bytes + AROUND)
                time.sleep(0.2)
                assert engine.pending_bytes > reply_bytes
                caller.send_signal(signal.SIGCONT)
                assert caller.communicate(timeout=60)[0] == "8192\n"
            finally:
                caller.kill()
        eventually(lambda: engine.pending_bytes == 0)


def test_a_stream_that_is_cancelled_gives_everything_back() -> None:
    """Its waiting items are released; the item that runs counts until it ends."""
    with serving(1 << 30) as (server, engine), grpc.insecure_channel(server.address) as channel:
        stream = RawStream(channel)
        with gate() as held:
            stream.send(held_item(0))
            held.arrived()
            # Only now: before it they might be answered and sent, and count no more.
            stream.send(*(wide(number) for number in range(1, 4)))
            eventually(lambda: engine.pending_bytes > 3 * 512 * REQUEST_BYTES)
            stream.call.cancel()
            stream.half_close()
            eventually(lambda: 0 < engine.pending_bytes < 8192)
            held.open()
        eventually(lambda: engine.pending_bytes == 0)


def test_unary_calls_give_everything_back() -> None:
    """Calls that are answered, refused or failed leave nothing counted, in either protocol."""
    with (
        serving(1 << 20) as (server, engine),
        grpc.insecure_channel(server.address) as channel,
    ):
        for _ in range(20):
            assert feature_stub(channel).Extract(unary()).tensors
            for bad in (unary(model="nobody"), unary(layers=[layer("nothing")])):
                with pytest.raises(grpc.RpcError):
                    feature_stub(channel).Extract(bad)
            infer = channel.unary_unary(
                f"{INFER}ModelInfer",
                request_serializer=pb.ModelInferRequest.SerializeToString,
                response_deserializer=pb.ModelInferResponse.FromString,
            )
            assert infer(raw_request()).outputs
            with pytest.raises(grpc.RpcError):
                infer(raw_request(model_name="nobody"))
        eventually(lambda: engine.pending_bytes == 0)


def test_a_request_that_is_too_much_is_refused_and_the_stream_goes_on() -> None:
    """It gets RESOURCE_EXHAUSTED in both protocols; the next item that fits is answered."""
    large = np.zeros((8, *ITEM), np.float32)
    with serving(16384) as (server, engine), grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            feature_stub(channel).Extract(unary(x=large))
        assert refused.value.code() is Code.RESOURCE_EXHAUSTED
        assert "the request takes" in refused.value.details()
        stream = RawStream(channel)
        stream.send(item(7, large))
        reply = stream.read()
        assert (reply.id, reply.error.code) == (7, Code.RESOURCE_EXHAUSTED.value[0])
        stream.send(item(7))
        assert stream.read().tensors
        assert stream.rest() == []
        infer = InferStream(channel)
        answer = infer.ask(raw_request(large, id="seven"))
        assert "the request takes" in answer.error_message
        assert answer.infer_response.id == "seven"
        assert infer.ask(raw_request()).infer_response.outputs
        infer.close()
        eventually(lambda: engine.pending_bytes == 0)


def unary(x: np.ndarray | None = None, **changes: object) -> object:
    """Return a unary request for residual's layer1."""
    fields = item(0, x, **changes)
    return feature_service_pb2.ExtractRequest(
        model=fields.model, inputs=fields.inputs, layers=fields.layers, extractor=fields.extractor
    )


def layer(name: str) -> feature_service_pb2.LayerSelection:
    """Return the selection of a layer."""
    return feature_service_pb2.LayerSelection(layer=name)
