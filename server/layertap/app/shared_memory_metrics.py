"""The metrics of the server's shared memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from layertap.shm.shared_memory import FALLBACK_REASONS, SharedMemory

__all__ = ["SharedMemoryCollector"]


class SharedMemoryCollector(Collector):
    """Reads the state of a server's shared memory each time the page is requested.

    Args:
        memory: The shared memory.
    """

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory

    def describe(self) -> list[Metric]:
        """Return nothing, so that registering this doesn't read the state."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read the state and return it as metrics."""
        state = self._memory.state()
        yield _by_state("bytes", "Bytes of regions", state.bytes)
        yield _by_state("regions", "Regions", state.regions)
        yield GaugeMetricFamily(
            "layertap_shared_memory_limit_bytes",
            "The limit for the bytes of all regions.",
            value=state.limit,
        )
        yield GaugeMetricFamily(
            "layertap_shared_memory_sessions",
            "Clients that share memory.",
            value=state.sessions,
        )
        yield CounterMetricFamily(
            "layertap_shared_memory_reply_bytes",
            "Bytes of replies written to shared memory instead of being sent.",
            value=state.reply_bytes,
        )
        fallbacks = CounterMetricFamily(
            "layertap_shared_memory_fallback",
            "Replies sent over the network instead: the limit or the client's share was reached, "
            "the session or socket was closed, or the system call failed.",
            labels=("reason",),
        )
        for reason in FALLBACK_REASONS:
            fallbacks.add_metric((reason,), state.fallbacks.get(reason, 0))
        yield fallbacks


def _by_state(name: str, text: str, values: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(
        f"layertap_shared_memory_{name}",
        f"{text} by state: leased to clients, for inputs, retired but not yet given back, or free.",
        labels=("state",),
    )
    for state, value in values.items():
        family.add_metric((state,), value)
    return family
