"""The spans of calls: one for each unary call and each stream, as part of the caller's trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry import context as current
from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from layertap.services.caller import Caller
from layertap.services.grpc_adapter.caller import caller_of

__all__ = ["TracingInterceptor"]

_W3C = TraceContextTextMapPropagator()
# Health checks and reflection come every few seconds and are of no interest.
_TRACED = ("/layertap.", "/inference.")

Code = grpc.StatusCode
# From the conventions for servers: only these statuses make a span an error, as others are the
# caller's fault.
SERVER_ERRORS = frozenset(
    {
        *(Code.UNKNOWN, Code.DEADLINE_EXCEEDED, Code.UNIMPLEMENTED),
        *(Code.INTERNAL, Code.UNAVAILABLE, Code.DATA_LOSS),
    }
)


class TracingInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]
    """Makes a server span for each call of layertap's services.

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
        handler, path = continuation(details), details.method
        if handler is None or not path.startswith(_TRACED):
            return handler
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(path, handler.unary_unary),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(path, handler.stream_stream),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return handler

    def _unary(self, path: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        def traced(message: Any, context: grpc.ServicerContext) -> Any:
            with self._span(path, context):
                return behaviour(message, context)

        return traced

    def _stream(self, path: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        def traced(messages: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with self._span(path, context):
                yield from behaviour(messages, context)

        # A behaviour may bring its own threads; gRPC looks at this attribute for them.
        threads = getattr(behaviour, "experimental_thread_pool", None)
        if threads is not None:
            traced.experimental_thread_pool = threads  # type: ignore[attr-defined]
        return traced

    @contextmanager
    def _span(self, path: str, context: grpc.ServicerContext) -> Iterator[None]:
        """Make the span of a call, and make it the current span.

        It stays the current span after the block: gRPC runs each call in its own
        ``contextvars.Context``, and an abandoned stream may be closed in another context.
        """
        # An unauthenticated caller may send any path; the path then reaches the refusal.
        service, _, method = path.strip("/").partition("/")
        caller = caller_of(context)
        span = self._tracer.start_span(
            f"{service}/{method}",
            context=_W3C.extract(caller.trace_context),
            kind=SpanKind.SERVER,
            attributes={
                "rpc.system": caller.transport,
                "rpc.service": service,
                "rpc.method": method,
            },
        )
        current.attach(trace.set_span_in_context(span))
        try:
            yield
            _tell(span, caller, context, _outcome(context))
        except GeneratorExit:
            _tell(span, caller, context, Code.CANCELLED)
            raise
        except Exception as error:
            # gRPC's abort raises a bare Exception; its context is the handler's own error.
            span.record_exception(error.__context__ or error)
            _tell(span, caller, context, context.code() or Code.UNKNOWN)
            raise
        finally:
            span.end()


def _outcome(context: grpc.ServicerContext) -> grpc.StatusCode:
    """Return the status of a call whose handler succeeded; its caller may have disconnected."""
    if context.is_active():
        return Code.OK
    remaining = context.time_remaining()
    over = remaining is not None and remaining <= 0
    return Code.DEADLINE_EXCEEDED if over else Code.CANCELLED


def _tell(
    span: trace.Span, caller: Caller, context: grpc.ServicerContext, code: grpc.StatusCode
) -> None:
    span.set_attribute("rpc.grpc.status_code", code.value[0])
    span.set_attribute("layertap.request_id", caller.request_id)
    if code in SERVER_ERRORS:
        span.set_status(StatusCode.ERROR, (context.details() or b"").decode("utf-8", "replace"))
