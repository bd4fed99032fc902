"""The client passes its caller's trace on, and does not need OpenTelemetry for that."""

from __future__ import annotations

import subprocess
import sys

from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

from layertap.client.trace_context import trace_metadata


def test_importing_the_client_imports_no_opentelemetry() -> None:
    """Using the client without OpenTelemetry neither imports it nor sends a trace."""
    code = (
        "import sys, layertap; from layertap.client.trace_context import trace_metadata\n"
        "assert trace_metadata() is None\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_span_sends_nothing() -> None:
    """If no span is active, there is no metadata."""
    assert trace_metadata() is None


def test_the_current_span_is_written_as_w3c_says() -> None:
    """The metadata are version, trace, span and flags in hexadecimal, and the unchanged state."""
    context = SpanContext(
        0xABC,
        0xDEF,
        is_remote=False,
        trace_flags=TraceFlags(1),
        trace_state=TraceState([("a", "b")]),
    )
    with trace.use_span(NonRecordingSpan(context)):
        assert trace_metadata() == (
            ("traceparent", f"00-{'0' * 29}abc-{'0' * 13}def-01"),
            ("tracestate", "a=b"),
        )
