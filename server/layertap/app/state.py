"""The metrics of a server's state, which is read each time the page is requested."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from layertap.engine import Engine

__all__ = ["StateCollector"]

_VERSIONS = ("layertap", "torch", "grpcio")


class StateCollector(Collector):
    """Reads the state of an engine. It counts nothing, so it adds no cost to requests.

    Args:
        engine: The engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._build = {
            **{"version" if name == "layertap" else name: version(name) for name in _VERSIONS},
            "python": platform.python_version(),
        }

    def describe(self) -> list[Metric]:
        """Return nothing, because the names of models are not known beforehand."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read the state and return it as metrics."""
        build = GaugeMetricFamily(
            "layertap_build_info",
            "Always 1; the labels hold the versions.",
            labels=tuple(self._build),
        )
        build.add_metric(tuple(self._build.values()), 1)
        yield build
        yield GaugeMetricFamily(
            "layertap_inference_pending_request_count",
            "Requests that wait for a compute thread or run on it.",
            value=self._engine.pending,
        )
        yield GaugeMetricFamily(
            "layertap_inference_pending_request_limit",
            "The limit for these requests; one more gets RESOURCE_EXHAUSTED.",
            value=self._engine.limits.pending,
        )
        yield GaugeMetricFamily(
            "layertap_inference_pending_bytes",
            "Bytes of requests and replies in memory: received, decoded, being written or sent.",
            value=self._engine.pending_bytes,
        )
        yield self._models()
        yield self._memory()

    def _models(self) -> Metric:
        ready = GaugeMetricFamily(
            "layertap_model_ready",
            "1 once the model is loaded and its declared layers are warm, 0 until then.",
            labels=("model",),
        )
        for name, reason in self._engine.states():
            ready.add_metric((name,), not reason)
        return ready

    def _memory(self) -> Metric:
        memory = GaugeMetricFamily(
            "layertap_model_memory_bytes",
            "Size of the parameters and buffers of the current version, on its device.",
            labels=("model", "device"),
        )
        for host in self._engine.hosts():
            memory.add_metric((host.model.name, str(host.model.device)), host.weight_bytes)
        return memory
