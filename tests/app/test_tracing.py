"""Traces continue the caller's, show where the time went, and reach a collector."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import grpc
import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collector
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as collector_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from authorities import EXTRACT as EXTRACT_TOKEN
from authorities import token_file
from kept import kept
from layertap import Client, Features, LayertapError
from layertap.app.security import Security
from layertap.app.server import FeatureServer, ServerOptions
from layertap.app.telemetry import open_tracing
from layertap.app.tracing import Tracing
from layertap.engine import Engine
from layertap.errors import ConfigError
from layertap.models import ModelSpec
from layertap.services.tokens import Tokens
from processes import serving
from streams import RawStream, eventually, item
from tinynets import ITEM

BATCH = np.zeros((2, *ITEM), np.float32)
EXTRACT = "layertap.v1.FeatureService/Extract"
STREAM = "layertap.v1.FeatureService/ExtractStream"
CLOCK_NS = 50_000_000
"""How far the system's clock, by which calls are timed, may be adjusted during a call.

Its parts are timed by a monotonic clock.
"""


class Traced:
    """A server that makes spans, a client, and the finished spans."""

    def __init__(self, client: Client, channel: grpc.Channel, spans: InMemorySpanExporter) -> None:
        self.client = client
        self.channel = channel
        self._spans = spans

    def spans(self) -> dict[str, ReadableSpan]:
        """Return the spans by name, once the call's own span has ended."""
        return {span.name: span for span in self._spans.get_finished_spans()}

    def named(self, name: str) -> list[ReadableSpan]:
        """Return all spans with a name."""
        return [span for span in self._spans.get_finished_spans() if span.name == name]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
    engine.load(ModelSpec("tinynets:raises", item_shape=ITEM))
    yield engine
    engine.close()


@pytest.fixture
def traced(engine: Engine) -> Iterator[Traced]:
    spans = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    tracing = Tracing(provider)
    server = FeatureServer(
        engine, ServerOptions(port=0), tracing, interceptors=(tracing.interceptor,)
    )
    server.start()
    server.ready()
    # Whose session would be a call, and a span, of its own.
    sent = Client(server.address, shared_memory=False)
    with sent as client, grpc.insecure_channel(server.address) as channel:
        yield Traced(client, channel, spans)
    server.stop(1)
    tracing.close()


def attributes(span: ReadableSpan) -> Mapping[str, object]:
    assert span.attributes is not None
    return span.attributes


def test_an_extraction_is_a_span_with_its_parts(traced: Traced) -> None:
    """Prepare, queue and compute follow one another, each as long as the reply says."""
    features = traced.client.extract("residual", BATCH, "layer1")
    spans = traced.spans()
    assert set(spans) == {EXTRACT, "prepare", "queue", "compute"}
    call = spans[EXTRACT]
    assert call.kind is trace.SpanKind.SERVER
    told = dict(attributes(call))
    assert len(str(told.pop("layertap.request_id"))) == 16
    assert told == {
        "rpc.system": "grpc",
        "rpc.service": "layertap.v1.FeatureService",
        "rpc.method": "Extract",
        "rpc.grpc.status_code": 0,
        "layertap.model": "residual",
        "layertap.extractor": features.extractor,
    }
    begun = call.start_time
    for name in ("prepare", "queue", "compute"):
        part = spans[name]
        assert part.parent == call.context
        assert part.start_time == begun
        assert part.end_time - part.start_time == getattr(features.timings, f"{name}_ns")
        begun = part.end_time
    assert begun <= call.end_time + CLOCK_NS


def test_a_variant_is_an_attribute(traced) -> None:
    """Only the span of a request whose program was not finished in the usual way has it."""
    named = {"extractor": "torchscript", "variant": "channels_last"}
    traced.client.extract("residual", BATCH, "conv1", **named)
    assert dict(attributes(traced.spans()[EXTRACT]))["layertap.variant"] == "channels_last"


def test_the_callers_trace_is_continued(traced: Traced) -> None:
    """The Python client sends its current span, which becomes the parent of the server's."""
    callers = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    with callers.start_as_current_span("caller") as caller:
        traced.client.extract("residual", BATCH, "layer1")
    call = traced.spans()[EXTRACT]
    assert call.parent is not None
    assert call.parent.is_remote
    assert call.parent.span_id == caller.get_span_context().span_id
    assert call.context.trace_id == caller.get_span_context().trace_id


def test_without_a_callers_span_a_trace_begins(traced: Traced) -> None:
    """A caller without a span sends no context, and the server's span is a root."""
    traced.client.extract("residual", BATCH, "layer1")
    assert traced.spans()[EXTRACT].parent is None


def test_a_stream_is_a_span_and_so_is_each_item(traced: Traced) -> None:
    """Items are spans inside the stream's span, with their phases; a failed item says why."""
    callers = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    with callers.start_as_current_span("caller") as caller:
        answers = list(
            traced.client.extract_many(
                "residual", [BATCH, BATCH[:, :1], BATCH], "layer1", return_errors=True
            )
        )
    eventually(lambda: STREAM in traced.spans())
    stream = traced.spans()[STREAM]
    assert stream.parent is not None
    assert stream.parent.span_id == caller.get_span_context().span_id
    assert attributes(stream)["rpc.grpc.status_code"] == 0
    assert "layertap.model" not in attributes(stream)
    items = traced.named("item")
    assert [item.parent for item in items] == [stream.context] * 3
    assert all(stream.start_time <= item.start_time <= item.end_time for item in items)
    (failed,) = [item for item in items if "rpc.grpc.status_code" in attributes(item)]
    assert attributes(failed)["rpc.grpc.status_code"] == 3
    assert attributes(failed)["layertap.model"] == "residual"
    parts = traced.named("compute")
    assert {part.parent.span_id for part in parts} == {
        item.context.span_id for item in items if item is not failed
    }
    told = sorted(each.timings.compute_ns for each in answers if isinstance(each, Features))
    assert sorted(part.end_time - part.start_time for part in parts) == told


def test_a_stream_that_is_left_ends_its_span(traced: Traced) -> None:
    """A client that disconnects leaves an ended span with CANCELLED."""
    stream = RawStream(traced.channel)
    # Replies that can't all be under way: with none left gRPC may tell of the cancellation as of a
    # half close first, after which the stream ends well.
    large = np.zeros((900, *ITEM), np.float32)
    stream.send(*(item(number, large) for number in range(1, 13)))
    assert stream.read().id
    stream.call.cancel()
    stream.half_close()
    eventually(lambda: STREAM in traced.spans())
    assert attributes(traced.spans()[STREAM])["rpc.grpc.status_code"] == 1


@pytest.mark.parametrize(
    ("parent", "state"),
    [("00-zz", ""), ("x" * 2000, "a=b"), (f"00-{'0' * 32}-{'0' * 16}-01", ""), ("", "=" * 600)],
)
def test_hostile_contexts_are_ignored(traced: Traced, parent: str, state: str) -> None:
    """A malformed traceparent is ignored; the call is answered."""
    method = traced.channel.unary_unary("/layertap.v1.FeatureService/ListModels")
    assert method(b"", metadata=(("traceparent", parent), ("tracestate", state)))
    assert traced.spans()["layertap.v1.FeatureService/ListModels"].parent is None


def test_a_context_that_is_not_sampled_makes_no_spans(traced: Traced) -> None:
    """If the caller decided not to sample, the server records no span."""
    method = traced.channel.unary_unary("/layertap.v1.FeatureService/ListModels")
    assert method(b"", metadata=(("traceparent", f"00-{'a' * 32}-{'b' * 16}-00"),))
    assert traced.spans() == {}


def test_a_broken_model_is_an_error_of_the_span(traced: Traced) -> None:
    """INTERNAL makes the span an error, with the status, its text, and the exception."""
    with pytest.raises(LayertapError) as failure:
        traced.client.extract("raises", BATCH + 1e6, "head")
    call = traced.spans()[EXTRACT]
    assert call.status.status_code is trace.StatusCode.ERROR
    assert call.status.description == str(failure.value)
    assert attributes(call)["rpc.grpc.status_code"] == grpc.StatusCode.INTERNAL.value[0]
    assert attributes(call)["layertap.model"] == "raises"
    (event,) = call.events
    assert str(event.attributes["exception.type"]).endswith("ModelRunError")


def test_a_callers_mistake_is_no_error_of_the_span(traced: Traced) -> None:
    """A refusal records its status and its exception, without making the span an error."""
    with pytest.raises(LayertapError):
        traced.client.extract("residual", BATCH, "layer9")
    call = traced.spans()[EXTRACT]
    assert call.status.status_code is trace.StatusCode.UNSET
    assert attributes(call)["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]
    assert str(call.events[0].attributes["exception.type"]).endswith("LayerNotFoundError")


def test_health_is_not_traced(traced: Traced) -> None:
    """Probes make no spans."""
    traced.client.wait_ready()
    traced.channel.unary_unary("/grpc.health.v1.Health/Check")(b"")
    assert traced.spans() == {}


def test_a_strangers_path_is_refused_as_any_other(engine: Engine, tmp_path: Path) -> None:
    """A path that names no service and method is UNAUTHENTICATED, and its text reveals nothing."""
    tracing = Tracing(TracerProvider(shutdown_on_exit=False))
    tokens = Tokens(token_file(tmp_path / "tokens", EXTRACT_TOKEN))
    server = FeatureServer(
        engine,
        ServerOptions(port=0),
        tracing,
        interceptors=(tracing.interceptor,),
        security=Security(tokens=tokens),
    )
    server.start()
    with grpc.insecure_channel(server.address) as channel:
        for path in ("/layertap.", "/layertap.v1.FeatureService/Extract/more"):
            with pytest.raises(grpc.RpcError, match="a valid token is needed") as caught:
                channel.unary_unary(path)(b"", timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    server.stop(1)
    tracing.close()


def test_off_unless_asked_for() -> None:
    """Without an endpoint, or with OpenTelemetry disabled, there is no tracing."""
    where = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"}
    assert open_tracing("", {}) is None
    assert open_tracing("", {**where, "OTEL_SDK_DISABLED": "true"}) is None
    assert open_tracing("", {**where, "OTEL_TRACES_EXPORTER": "none"}) is None


def test_wrong_settings_are_told() -> None:
    """An endpoint without a scheme, or a protocol other than gRPC, is an error that says so."""
    for endpoint in ("collector:4317", "http://", "http://[::1"):
        with pytest.raises(ConfigError, match=f"otel_endpoint: got {re.escape(repr(endpoint))}"):
            open_tracing(endpoint, {})
    with pytest.raises(ConfigError, match="http/protobuf"):
        open_tracing(
            "",
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            },
        )


def test_missing_packages_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """If traces are requested without the extra, the error says what to install."""

    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'opentelemetry'", name="opentelemetry")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"pip install 'layertap\[otel\]'"):
        open_tracing("http://127.0.0.1:4317", {})


class Collector(collector_grpc.TraceServiceServicer):
    """Receives spans as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.got: SimpleQueue[collector.ExportTraceServiceRequest] = SimpleQueue()

    def Export(  # noqa: N802 - gRPC's name
        self, request: collector.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> collector.ExportTraceServiceResponse:
        self.got.put(request)
        return collector.ExportTraceServiceResponse()


def test_spans_reach_a_collector() -> None:
    """``layertap serve --otel-endpoint`` sends its spans by OTLP, the last ones when it stops."""
    collecting = Collector()
    receiver = grpc.server(ThreadPoolExecutor(2))
    collector_grpc.add_TraceServiceServicer_to_server(collecting, receiver)
    port = receiver.add_insecure_port("127.0.0.1:0")
    receiver.start()
    where = f"http://127.0.0.1:{port}"
    try:
        with (
            serving(
                "tinynets:residual", "--item-shape", "3,8,8", "--otel-endpoint", where
            ) as server,
            Client(server.address, shared_memory=False) as client,
        ):
            client.extract("residual", np.zeros((1, 3, 8, 8), np.float32), "layer1")
            server.process.terminate()
            assert server.ended() == 0
        (resource,) = collecting.got.get(timeout=60).resource_spans
    finally:
        receiver.stop(0)
    about = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert about["service.name"] == "layertap"
    names = {span.name for scope in resource.scope_spans for span in scope.spans}
    assert names == {EXTRACT, "prepare", "queue", "compute"}


@pytest.mark.long
def test_a_collector_that_is_gone_holds_nothing_up() -> None:
    """Without a collector calls are answered, and the server stops with code 0."""
    with (
        serving(
            *("tinynets:residual", "--item-shape", "3,8,8"),
            *("--otel-endpoint", "http://127.0.0.1:9"),
        ) as server,
        Client(server.address, shared_memory=False) as client,
    ):
        client.extract("residual", np.zeros((1, 3, 8, 8), np.float32), "layer1")
        server.process.terminate()
        assert server.ended() == 0
