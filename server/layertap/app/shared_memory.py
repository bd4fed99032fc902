"""A server's shared memory: whether it has any, and what the metrics page shows of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from layertap.wire.shared.broker import Broker
from layertap.wire.shared.hub import FALLBACK_REASONS, SharedMemory
from layertap.wire.shared.regions import supported

__all__ = ["SharedMemoryCollector", "open_broker"]

_log = logging.getLogger(__name__)


def open_broker(limit_bytes: int, lease_seconds: float) -> Broker | None:
    """Return where clients of this machine connect; None without a limit, and beside Linux."""
    if not limit_bytes or not supported():
        return None
    try:
        return Broker(SharedMemory(limit_bytes, lease_seconds))
    except OSError as error:  # Sockets or anonymous files are forbidden, as in some sandboxes.
        _log.warning("there is no shared memory: %s", error)
        return None


class SharedMemoryCollector(Collector):
    """Reads a server's shared memory when the page is asked for.

    Args:
        memory: It.
    """

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory

    def describe(self) -> list[Metric]:
        """Return nothing, so that it is not read when it is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read it."""
        state = self._memory.state()
        yield _by_state("bytes", "Bytes of regions", state.bytes)
        yield _by_state("regions", "Regions", state.regions)
        yield GaugeMetricFamily(
            "layertap_shared_memory_limit_bytes", "Bytes that they may have.", value=state.limit
        )
        yield GaugeMetricFamily(
            "layertap_shared_memory_sessions",
            "Clients that share memory.",
            value=state.sessions,
        )
        yield CounterMetricFamily(
            "layertap_shared_memory_reply_bytes",
            "Bytes of replies that were written there instead of sent.",
            value=state.reply_bytes,
        )
        fallbacks = CounterMetricFamily(
            "layertap_shared_memory_fallback",
            "Replies that were sent all the same: the region limit or the client's share is "
            "reached, its session or socket is gone, the system refused.",
            labels=("reason",),
        )
        for reason in FALLBACK_REASONS:
            fallbacks.add_metric((reason,), state.fallbacks.get(reason, 0))
        yield fallbacks


def _by_state(name: str, text: str, values: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(
        f"layertap_shared_memory_{name}",
        f"{text}: leased to clients, for their inputs, retired and not given back, free.",
        labels=("state",),
    )
    for state, value in values.items():
        family.add_metric((state,), value)
    return family
