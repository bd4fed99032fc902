"""OpenTelemetry traces: a span for each call, with child spans for the phases of an extraction.

This is imported only if traces are requested, because it needs the packages of ``layertap[otel]``.
The names of attributes are those of OpenTelemetry's semantic conventions for RPC.
"""

from __future__ import annotations

import logging
import time
from threading import Thread

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import StatusCode

from layertap import __version__
from layertap.app.tracing_interceptor import SERVER_ERRORS, TracingInterceptor
from layertap.engine import Extraction
from layertap.services.caller import Caller
from layertap.services.error_codes import ErrorCode
from layertap.services.grpc_adapter.statuses import STATUS
from layertap.timings import Timings

__all__ = ["FLUSH_SECONDS", "Tracing", "otlp_provider"]

FLUSH_SECONDS = 5.0
"""Time for the last spans to reach the collector when the server stops.

The exporter's own limit is ten seconds or more, and stopping would take that long whenever the
collector is gone.
"""

_log = logging.getLogger(__name__)


def otlp_provider(endpoint: str) -> TracerProvider:
    """Return a provider that sends spans by OTLP over gRPC, in batches and on its own thread.

    Args:
        endpoint: An ``http://`` or ``https://`` address; if empty, ``OTEL_*`` variables define it.
            These also define the sampler, headers, certificates and the resource's attributes.
    """
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "layertap"}))
    provider = TracerProvider(
        resource=resource.merge(Resource({SERVICE_VERSION: __version__})),
        shutdown_on_exit=False,  # Tracing.close does this, with a shorter limit.
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint or None)))
    return provider


class Tracing:
    """Makes spans (a ``layertap.services.observer.Observer``).

    Args:
        provider: Where spans go; ``close`` closes it too.

    Attributes:
        interceptor: Makes the span of each call; the observer's reports are added to that span.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("layertap", __version__)
        self.interceptor = TracingInterceptor(self._tracer)

    def succeeded(self, model: str, extraction: Extraction[bytes], caller: Caller) -> None:
        """Record what was extracted, and add a span for each part of the reply's timings.

        In a stream, each item has its own span inside the stream's span.
        """
        span, item = trace.get_current_span(), None
        if not isinstance(span, ReadableSpan) or span.start_time is None:
            return  # Not sampled.
        begun_ns = span.start_time
        if caller.in_stream:
            begun_ns = time.time_ns() - extraction.timings.total_ns
            span = item = self._tracer.start_span("item", start_time=begun_ns)
        span.set_attributes(
            {"layertap.model": model, "layertap.extractor": str(extraction.extractor)}
        )
        if extraction.variant:
            span.set_attribute("layertap.variant", extraction.variant)
        self._add_parts(span, begun_ns, extraction.timings)
        if item is not None:
            item.end()

    def failed(self, model: str, code: ErrorCode, caller: Caller) -> None:
        """Record which model's extraction failed, and for an item of a stream also the error."""
        named = {"layertap.model": model} if model else {}
        if not caller.in_stream:
            trace.get_current_span().set_attributes(named)
            return
        item = self._tracer.start_span("item", attributes=named)
        status = STATUS[code]
        item.set_attribute("rpc.grpc.status_code", status.value[0])
        if status in SERVER_ERRORS:
            item.set_status(StatusCode.ERROR)
        item.end()

    def _add_parts(self, span: trace.Span, begun_ns: int, timings: Timings) -> None:
        parts = {
            "prepare": timings.prepare_ns,
            "queue": timings.queue_ns,
            "compute": timings.compute_ns,
        }
        within = trace.set_span_in_context(span)
        for name, duration_ns in parts.items():
            part = self._tracer.start_span(name, within, start_time=begun_ns)
            begun_ns += duration_ns
            part.end(begun_ns)

    def close(self) -> None:
        """Send the remaining spans, for at most FLUSH_SECONDS."""
        flushing = Thread(target=self._provider.shutdown, name="layertap-flush", daemon=True)
        flushing.start()
        flushing.join(FLUSH_SECONDS)
        if flushing.is_alive():
            _log.warning("the last spans could not be sent to the collector")
