"""How requests are grouped into batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from layertap.settings import value_kinds as kinds
from layertap.settings.definition import Setting

__all__ = ["ALONE", "BatchPolicy"]


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """How many items a batch may have, and how many seconds it may wait for more."""

    max_size: Annotated[
        int,
        Setting(
            "Most items, of several requests together, in one forward pass; 1 runs each request "
            "alone. A larger request runs alone too.",
            kinds.COUNT,
            key="max_batch_size",
        ),
    ] = 1
    max_delay: Annotated[
        float,
        Setting(
            "Most microseconds that a request waits for others to join its pass, if the last pass "
            "served several requests; 0 joins only requests that are waiting already.",
            kinds.MICROSECONDS,
            key="max_queue_delay_us",
        ),
    ] = 0.0
    max_tokens: Annotated[
        int,
        Setting(
            "Most tokens, padding included, in one forward pass of items of different lengths. "
            "Such items share a pass only in layers whose values padding does not change; 0 never "
            "pads an item because of another request, and never divides a request.",
            kinds.whole(0),
            key="max_tokens_per_pass",
        ),
    ] = 0


ALONE = BatchPolicy()
"""Each request runs alone."""
