"""OpenTelemetry traces: a span for each call, and in it where an extraction's time went.

Imported only where traces are asked for: it needs the packages of ``layertap[otel]``. Names of
attributes are those of OpenTelemetry's semantic conventions for RPC.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Thread
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from layertap import __version__
from layertap.engine import Extraction
from layertap.services.request import REQUEST_ID_KEY

__all__ = ["FLUSH_SECONDS", "Tracing", "TracingInterceptor", "otlp_provider"]

FLUSH_SECONDS = 5.0
"""What the last spans get to reach the collector when the server stops.

The exporter's own limit is ten seconds and more, and a stop would take them wherever the collector
is gone.
"""

_log = logging.getLogger(__name__)

_W3C = TraceContextTextMapPropagator()
_CONTEXT_KEYS = ("traceparent", "tracestate")
# Health checks and reflection come every few seconds and tell nobody anything.
_TRACED = ("/layertap.", "/inference.")

Code = grpc.StatusCode
# The conventions' list for servers: what went wrong on the caller's side is no error of the span.
_SERVER_ERRORS = frozenset(
    {
        *(Code.UNKNOWN, Code.DEADLINE_EXCEEDED, Code.UNIMPLEMENTED),
        *(Code.INTERNAL, Code.UNAVAILABLE, Code.DATA_LOSS),
    }
)


def otlp_provider(endpoint: str) -> TracerProvider:
    """Return a provider that sends spans by OTLP over gRPC, in batches and on a thread of its own.

    Args:
        endpoint: An ``http://`` or ``https://`` address; if empty, ``OTEL_*`` says it. Those
            variables also say the sampler, headers, certificates, and the resource's attributes.
    """
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "layertap"}))
    provider = TracerProvider(
        resource=resource.merge(Resource({SERVICE_VERSION: __version__})),
        shutdown_on_exit=False,  # Tracing.close does it, and waits for less long.
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint or None)))
    return provider


class Tracing:
    """Makes spans (a ``layertap.services.observer.Observer``).

    Args:
        provider: Where spans go; closed with this.

    Attributes:
        interceptor: Makes the span of a call; what the observer is told goes into it.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("layertap", __version__)
        self.interceptor = TracingInterceptor(self._tracer)

    def succeeded(self, model: str, extraction: Extraction) -> None:
        """Say what was extracted, and add a span for each part of the reply's timings."""
        span = trace.get_current_span()
        if not isinstance(span, ReadableSpan) or span.start_time is None:
            return  # Not sampled.
        span.set_attributes(
            {"layertap.model": model, "layertap.extractor": str(extraction.extractor)}
        )
        timings = extraction.timings
        parts = {
            "prepare": timings.prepare_ns,
            "queue": timings.queue_ns,
            "compute": timings.compute_ns,
        }
        begun_ns = span.start_time
        for name, duration_ns in parts.items():
            child = self._tracer.start_span(name, start_time=begun_ns)
            begun_ns += duration_ns
            child.end(begun_ns)

    def failed(self, model: str, code: grpc.StatusCode) -> None:
        """Say whose extraction failed; the interceptor says how."""
        if model:
            trace.get_current_span().set_attribute("layertap.model", model)

    def close(self) -> None:
        """Send what has not been sent yet, for at most FLUSH_SECONDS."""
        flushing = Thread(target=self._provider.shutdown, name="layertap-flush", daemon=True)
        flushing.start()
        flushing.join(FLUSH_SECONDS)
        if flushing.is_alive():
            _log.warning("the last spans did not reach the collector")


class TracingInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]
    """Makes a server span for each unary call of layertap's services.

    Args:
        tracer: Makes the spans.
    """

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Wrap the handler of a call that is traced."""
        handler = continuation(details)
        if handler is None or handler.unary_unary is None or not _is_traced(details.method):
            return handler
        method, behaviour = details.method, handler.unary_unary

        def traced(message: Any, context: grpc.ServicerContext) -> Any:
            return self._call(method, behaviour, message, context)

        return grpc.unary_unary_rpc_method_handler(
            traced, handler.request_deserializer, handler.response_serializer
        )

    def _call(
        self,
        path: str,
        behaviour: Callable[[Any, grpc.ServicerContext], Any],
        message: Any,
        context: grpc.ServicerContext,
    ) -> Any:
        service, method = path.strip("/").split("/", 1)
        with self._tracer.start_as_current_span(
            f"{service}/{method}",
            context=_W3C.extract(_carrier(context)),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                reply = behaviour(message, context)
            except Exception as error:
                # gRPC's abort raises a bare Exception while the handler's own error is handled.
                span.record_exception(error.__context__ or error)
                _end(span, context, context.code() or Code.UNKNOWN)
                raise
            _end(span, context, Code.OK)
        return reply


def _is_traced(path: str) -> bool:
    return path.startswith(_TRACED)


def _carrier(context: grpc.ServicerContext) -> dict[str, str]:
    metadata = context.invocation_metadata() or ()
    return {key: value for key, value in metadata if key in _CONTEXT_KEYS}


def _end(span: trace.Span, context: grpc.ServicerContext, code: grpc.StatusCode) -> None:
    span.set_attribute("rpc.grpc.status_code", code.value[0])
    if request_id := dict(context.trailing_metadata() or ()).get(REQUEST_ID_KEY):
        span.set_attribute("layertap.request_id", request_id)
    if code in _SERVER_ERRORS:
        span.set_status(StatusCode.ERROR, (context.details() or b"").decode("utf-8", "replace"))
