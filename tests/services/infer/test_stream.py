"""A stream answers its requests in order, continues after failures, and leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue

import grpc
import numpy as np
import pytest

from gatednets import HELD, gate
from infering import arrays, batch, given, output, parameters, raw_request
from kept import kept
from layertap.app.server import FeatureServer
from layertap.engine import Engine, Limits
from layertap.inference import grpc_service_pb2 as pb
from layertap.models import ModelSpec
from layertap.services.caller import Caller
from layertap.services.infer.service import InferenceService, InferenceSettings
from layertap.services.infer.statistics import Statistics
from layertap.services.open_streams import OpenStreams
from layertap.services.stream_threads import StreamThreads
from serving import started_server
from streams import GATED_ITEM, Counting, eventually, readers
from tinynets import ITEM

Code = grpc.StatusCode
PLACES = 4
METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"


@pytest.fixture(scope="module")
def narrow() -> Iterator[Engine]:
    """An engine with a compute thread for every item, and room for four items of a stream."""
    engine = Engine(
        Limits(streams=2, stream_in_flight=PLACES), instances=PLACES + 2, plan_cache=kept()
    )
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    engine.load(ModelSpec("gatednets:gated", item_shape=GATED_ITEM))
    yield engine
    engine.close()


@pytest.fixture
def counted() -> Counting:
    """The observer of the server."""
    return Counting()


@pytest.fixture
def narrow_server(narrow: Engine, counted: Counting) -> Iterator[FeatureServer]:
    """A server of that engine."""
    with started_server(narrow, counted) as server:
        yield server


@pytest.fixture
def line(narrow_server: FeatureServer) -> Iterator[grpc.Channel]:
    """A channel to it."""
    with grpc.insecure_channel(narrow_server.address) as channel:
        yield channel


@pytest.fixture(autouse=True)
def _nothing_is_left(narrow: Engine) -> Iterator[None]:
    """After each test no item is pending and no reader is left."""
    yield
    eventually(lambda: narrow.pending == 0)
    eventually(lambda: not readers())


class Stream:
    """A stream to which the test writes message by message."""

    def __init__(self, channel: grpc.Channel, timeout: float = 60) -> None:
        self._out: SimpleQueue[bytes | None] = SimpleQueue()
        method = channel.stream_stream(
            METHOD, response_deserializer=pb.ModelStreamInferResponse.FromString
        )
        self.call = method(iter(self._out.get, None), timeout=timeout)

    def send(self, *requests: object) -> None:
        for request in requests:
            self._out.put(request if isinstance(request, bytes) else request.SerializeToString())

    def rest(self) -> list[pb.ModelStreamInferResponse]:
        self._out.put(None)
        return list(self.call)


def held(number: int) -> pb.ModelInferRequest:
    """Return a request that waits at the gate."""
    x = np.full((1, *GATED_ITEM), HELD, np.float32)
    return raw_request(x, output("conv"), model_name="gated", id=str(number))


def test_replies_come_in_the_order_of_the_requests(line, counted) -> None:
    """Each has its own values, with or without an id, in any order of finishing."""
    given_ = [batch(n % 3 + 1, seed=n) for n in range(40)]
    stream = Stream(line)
    # One extractor, as others round differently: AUTO would go over to another in between.
    hook = parameters({"extractor": "hook"})
    ids = [str(n) if n % 2 else "" for n in range(40)]
    stream.send(
        *(raw_request(x, id=name, parameters=hook) for name, x in zip(ids, given_, strict=True))
    )
    replies = stream.rest()
    assert stream.call.code() is Code.OK
    assert [r.infer_response.id for r in replies] == ids
    alone = line.unary_unary(
        METHOD.replace("ModelStreamInfer", "ModelInfer"),
        pb.ModelInferRequest.SerializeToString,
        pb.ModelInferResponse.FromString,
    )
    for x, reply in zip(given_, replies, strict=True):
        assert reply.error_message == ""
        assert reply.infer_response.parameters["triton_final_response"].bool_param
        expected = arrays(alone(raw_request(x, parameters=hook)))
        assert np.array_equal(arrays(reply.infer_response)["layer1"], expected["layer1"])
    assert counted.ends["residual OK"] == 80


def test_a_quick_item_waits_for_a_slow_one_before_it(line, counted) -> None:
    """The quick item is computed in the meantime, and sent second."""
    stream = Stream(line)
    with gate() as opened:
        stream.send(held(1), raw_request(id="2"))
        counted.wait("residual OK", 1)
        opened.open()
        replies = stream.rest()
    assert [r.infer_response.id for r in replies] == ["1", "2"]


def test_a_failed_item_is_answered_and_the_stream_goes_on(line, counted) -> None:
    """Refused, unknown and malformed items are answered with a text, and the id if there is one."""
    bad_size = raw_request(id="b", inputs=[given("input", "FP32", [1, 3, 16, 15])])
    stream = Stream(line)
    stream.send(
        raw_request(id="a"),
        bad_size,
        raw_request(id="c", model_name="nope"),
        b"\x0a\xff",
        raw_request(id="e"),
    )
    replies = stream.rest()
    assert stream.call.code() is Code.OK
    assert [r.infer_response.id for r in replies] == ["a", "b", "c", "", "e"]
    texts = [r.error_message for r in replies]
    assert (texts[0], texts[4]) == ("", "")
    assert "unexpected total byte size" in texts[1]
    assert "Request for unknown model: 'nope'" in texts[2]
    assert "message: " in texts[3]
    assert counted.ends["residual INVALID_ARGUMENT"] == 1
    assert counted.ends[" NOT_FOUND"] == counted.ends[" INVALID_ARGUMENT"] == 1


def test_a_bounded_number_is_in_flight(line, narrow) -> None:
    """The server reads no more than four items before it has sent a reply."""
    stream = Stream(line)
    with gate() as opened:
        stream.send(*(held(n) for n in range(3 * PLACES)))
        eventually(lambda: narrow.pending == PLACES)
        threading.Event().wait(0.2)
        assert narrow.pending == PLACES
        opened.open()
        assert len(stream.rest()) == 3 * PLACES


def test_a_cancelled_stream_cancels_its_items(line, counted) -> None:
    """Once the client is gone, its items in flight are abandoned at their next layer."""
    stream = Stream(line)
    with gate() as closed:
        stream.send(*(held(n) for n in range(PLACES)))
        for _ in range(PLACES):
            closed.arrived()
        stream.call.cancel()
        eventually(lambda: not readers())  # So the server knows.
    counted.wait("gated CANCELLED", PLACES)


def test_streams_of_both_protocols_share_one_bound(line) -> None:
    """With two open streams, one of them native, a third is refused."""
    first = Stream(line)
    first.send(raw_request())
    next(first.call)
    out: SimpleQueue[bytes | None] = SimpleQueue()
    native = line.stream_stream("/layertap.v1.FeatureService/ExtractStream")(
        iter(out.get, None), timeout=60
    )
    out.put(b"")
    next(native)
    third = Stream(line)
    with pytest.raises(grpc.RpcError) as caught:
        next(third.call)
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    out.put(None)
    assert list(native) == []
    first.rest()
    third._out.put(None)


def test_a_draining_server_answers_what_it_has(line, narrow, narrow_server) -> None:
    """Items in flight are answered, then the stream ends with UNAVAILABLE."""
    stream = Stream(line)
    with gate() as opened:
        stream.send(held(1))
        eventually(lambda: narrow.pending == 1)
        stopping = threading.Thread(target=narrow_server.stop, args=(30,))
        stopping.start()
        eventually(lambda: narrow_server._streams._draining)
        opened.open()
        assert next(stream.call).infer_response.id == "1"
        with pytest.raises(grpc.RpcError) as caught:
            next(stream.call)
        assert caught.value.code() is Code.UNAVAILABLE
        stream._out.put(None)
        stopping.join()


def test_the_deadline_of_the_stream_is_its_items(line) -> None:
    """An item that is still waiting then ends with the stream, and is not computed."""
    stream = Stream(line, timeout=0.5)
    with gate():
        stream.send(held(1))
        # The item's own error may come first; the stream's end comes in any case.
        with pytest.raises(grpc.RpcError) as caught:
            list(stream.call)
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        stream._out.put(None)


def test_an_item_that_nobody_waits_for_is_counted(narrow) -> None:
    """If the stream ends before a thread takes the item, the item counts as failed."""
    seen = Counting()
    threads = StreamThreads(OpenStreams(1), seen)
    settings = InferenceSettings(lambda: True, Statistics())
    service = InferenceService(narrow, settings, seen, threads)
    caller = Caller()
    caller.call.cancel()
    answer = service.answer_item(b"", caller, narrow.reserve(0))
    reply = pb.ModelStreamInferResponse.FromString(answer.message)
    assert reply.error_message == "the client cancelled the call or disconnected"
    assert seen.ends == {" CANCELLED": 1}
