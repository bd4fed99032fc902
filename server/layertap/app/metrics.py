"""The Prometheus metrics: counts, durations, the queue and memory.

The names follow Triton's ``nv_inference_*`` if they mean the same, with the prefix ``layertap_``
and Prometheus' own units (seconds, bytes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
)

from layertap.app.shared_memory_metrics import SharedMemoryCollector
from layertap.app.state import StateCollector
from layertap.engine import Engine, Extraction
from layertap.malloc import retained_bytes
from layertap.services.caller import Caller
from layertap.services.error_codes import ErrorCode
from layertap.shm.shared_memory import SharedMemory

__all__ = ["Metrics"]

# From a tiny model on a GPU to a large one on a CPU.
_SECONDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
    *(0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
_NS = 1e-9


@dataclass(frozen=True, slots=True)
class _ModelCounts:
    """One model's counters. Looking them up by label for each request would cost microseconds."""

    success: Counter
    passes: Counter
    reply_bytes: Counter
    total: Histogram
    prepare: Histogram
    queue: Histogram
    compute: Histogram


class Metrics:
    """Counts extractions (a ``layertap.services.observer.Observer``).

    It has its own registry, so that two servers in one process are counted separately.

    Args:
        engine: The engine whose queue and models are shown; if None, these gauges are left out.

    Attributes:
        registry: The registry.
    """

    def __init__(self, engine: Engine | None = None) -> None:
        self.registry = CollectorRegistry()
        self._of_model: dict[str, _ModelCounts] = {}
        self._success = self._counter(
            "request_success", "Extractions that were answered.", ("model",)
        )
        self._passes = self._counter(
            "exec", "Forward passes; fewer than the extractions if some shared a pass.", ("model",)
        )
        self._failure = self._counter(
            "request_failure",
            "Failed extractions, by gRPC status; model is empty if the request named no served "
            "model.",
            ("model", "reason"),
        )
        self._reply_bytes = self._counter(
            "reply_bytes",
            "Bytes of the extractions' replies, including those in shared memory.",
            ("model",),
        )
        self._total = self._histogram(
            "request", "Time from the arrival of a request to its finished reply."
        )
        self._prepare = self._histogram(
            "prepare", "Parsing, checks, decoding and preprocessing images."
        )
        self._queue = self._histogram("queue", "Waiting for a compute thread.")
        self._compute = self._histogram(
            "compute", "The forward pass and writing the outputs into the reply."
        )
        if engine is not None:
            self.registry.register(StateCollector(engine))
        self._show_memory()

    def show_waiting(self, waiting: Callable[[], int]) -> None:
        """Show the number of calls that wait for a thread to parse them."""
        Gauge(
            "layertap_grpc_waiting_call_count",
            "Calls that have arrived and wait for a worker thread.",
            registry=self.registry,
        ).set_function(waiting)

    def show_shared_memory(self, memory: SharedMemory) -> None:
        """Show the memory that is shared with clients on this machine."""
        self.registry.register(SharedMemoryCollector(memory))

    def succeeded(self, model: str, extraction: Extraction[bytes], caller: Caller) -> None:
        """Count a successful extraction, its bytes and its timings."""
        counts = self._of_model.get(model) or self._add_model(model)
        counts.success.inc()
        counts.passes.inc(1 / extraction.together)  # A shared pass then counts once in all.
        counts.reply_bytes.inc(len(extraction.payload) + extraction.shared_bytes)
        timings = extraction.timings
        counts.total.observe(timings.total_ns * _NS)
        counts.prepare.observe(timings.prepare_ns * _NS)
        counts.queue.observe(timings.queue_ns * _NS)
        counts.compute.observe(timings.compute_ns * _NS)

    def failed(self, model: str, code: ErrorCode, caller: Caller) -> None:
        """Count a failed extraction by its status."""
        self._failure.labels(model, code.name).inc()

    def _show_memory(self) -> None:
        """Show the process's memory and, if malloc reports it, how much of it is free."""
        ProcessCollector(registry=self.registry)
        if retained_bytes() is not None:
            Gauge(
                "layertap_memory_retained_bytes",
                "Free memory that malloc has not returned to the system.",
                registry=self.registry,
            ).set_function(lambda: retained_bytes() or 0)

    def _add_model(self, model: str) -> _ModelCounts:
        counts = self._of_model[model] = _ModelCounts(
            success=self._success.labels(model),
            passes=self._passes.labels(model),
            reply_bytes=self._reply_bytes.labels(model),
            total=self._total.labels(model),
            prepare=self._prepare.labels(model),
            queue=self._queue.labels(model),
            compute=self._compute.labels(model),
        )
        return counts

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"layertap_inference_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(
            f"layertap_inference_{name}_duration_seconds",
            text,
            ("model",),
            registry=self.registry,
            buckets=_SECONDS,
        )
