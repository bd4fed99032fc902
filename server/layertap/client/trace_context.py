"""Passes the caller's OpenTelemetry trace, if any, on to the server."""

from __future__ import annotations

import sys

__all__ = ["trace_metadata"]


def trace_metadata() -> tuple[tuple[str, str], ...] | None:
    """Return the current span as W3C metadata (``traceparent``, ``tracestate``); None if none.

    This imports nothing: if OpenTelemetry was never imported, no span can be active. So callers
    without it pay only for a look into a dict.
    """
    current = getattr(sys.modules.get("opentelemetry.trace"), "get_current_span", None)
    if current is None:
        return None
    span = current().get_span_context()
    if not span.is_valid:
        return None
    parent = f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
    if not span.trace_state:
        return (("traceparent", parent),)
    return (("traceparent", parent), ("tracestate", span.trace_state.to_header()))
