"""How the time of a request is divided."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Timings"]


@dataclass(frozen=True, slots=True)
class Timings:
    """The parts of a request's time in nanoseconds; see ``layertap.v1.Timings``.

    Attributes:
        prepare_ns: From the request's arrival until it waits for a compute thread.
        queue_ns: From then until its forward pass begins.
        compute_ns: The duration of the forward pass.
        total_ns: The total.
    """

    prepare_ns: int = 0
    queue_ns: int = 0
    compute_ns: int = 0
    total_ns: int = 0
