"""Statistics of each model since the server started."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from layertap.engine import Extraction, ModelHost
from layertap.inference import grpc_service_pb2 as pb
from layertap.services.caller import Caller
from layertap.services.error_codes import ErrorCode
from layertap.services.infer.infer_form import MODEL_VERSION

__all__ = ["Statistics"]

MAX_SIZES = 64
"""Maximum number of batch sizes with their own statistics; later sizes get none."""


@dataclass(slots=True)
class _Sum:
    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns

    def told(self) -> pb.StatisticDuration:
        return pb.StatisticDuration(count=self.count, ns=self.ns)


@dataclass(slots=True)
class _Parts:
    """How the time of requests is divided."""

    prepare: _Sum = field(default_factory=_Sum)
    queue: _Sum = field(default_factory=_Sum)
    compute: _Sum = field(default_factory=_Sum)
    rest: _Sum = field(default_factory=_Sum)


@dataclass(slots=True)
class _Model:
    success: _Sum = field(default_factory=_Sum)
    fail: _Sum = field(default_factory=_Sum)
    parts: _Parts = field(default_factory=_Parts)
    sizes: dict[int, _Parts] = field(default_factory=dict)
    items: int = 0
    passes: float = 0.0
    last_ms: int = 0


class Statistics:
    """Counts extractions of all protocols (a ``layertap.services.observer.Observer``)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: defaultdict[str, _Model] = defaultdict(_Model)

    def succeeded(self, model: str, extraction: Extraction[bytes], caller: Caller) -> None:
        """Count an extraction that succeeded."""
        times = extraction.timings
        rest = times.total_ns - times.prepare_ns - times.queue_ns - times.compute_ns
        with self._lock:
            counts = self._models[model]
            counts.success.add(times.total_ns)
            counts.items += extraction.items
            counts.passes += 1 / extraction.together  # A shared pass then counts once in all.
            counts.last_ms = time.time_ns() // 1_000_000
            told = [counts.parts]
            if extraction.items in counts.sizes or len(counts.sizes) < MAX_SIZES:
                told.append(counts.sizes.setdefault(extraction.items, _Parts()))
            for parts in told:
                parts.prepare.add(times.prepare_ns)
                parts.queue.add(times.queue_ns)
                parts.compute.add(times.compute_ns)
                parts.rest.add(rest)

    def failed(self, model: str, code: ErrorCode, caller: Caller) -> None:
        """Count a failed request for a served model."""
        if model:
            with self._lock:
                ns = time.perf_counter_ns() - caller.call.started_ns
                self._models[model].fail.add(ns)

    def of(self, hosts: Iterable[ModelHost]) -> pb.ModelStatisticsResponse:
        """Return the statistics of these models."""
        with self._lock:
            return pb.ModelStatisticsResponse(
                model_stats=[_told(host, self._models[host.model.name]) for host in hosts]
            )


def _told(host: ModelHost, counts: _Model) -> pb.ModelStatistics:
    parts, none = counts.parts, pb.StatisticDuration()
    device = host.model.device
    return pb.ModelStatistics(
        name=host.model.name,
        version=MODEL_VERSION,
        last_inference=counts.last_ms,
        inference_count=counts.items,
        execution_count=round(counts.passes),
        inference_stats=pb.InferStatistics(
            success=counts.success.told(),
            fail=counts.fail.told(),
            queue=parts.queue.told(),
            compute_input=parts.prepare.told(),
            compute_infer=parts.compute.told(),
            compute_output=parts.rest.told(),
            cache_hit=none,
            cache_miss=none,
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=size,
                compute_input=of_size.prepare.told(),
                compute_infer=of_size.compute.told(),
                compute_output=of_size.rest.told(),
            )
            for size, of_size in sorted(counts.sizes.items())
        ],
        memory_usage=[
            pb.MemoryUsage(
                type="GPU" if device.type == "cuda" else "CPU",
                id=device.index or 0,
                byte_size=host.weight_bytes,
            )
        ],
    )
