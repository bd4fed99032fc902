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
            "Items of several requests that may share a forward pass; 1 runs each request alone, "
            "and so does a request that is larger by itself.",
            kinds.COUNT,
            key="max_batch_size",
        ),
    ] = 1
    max_delay: Annotated[
        float,
        Setting(
            "Microseconds that a request may be held back for others to join it, where the last "
            "pass had several callers; 0 joins only those that are waiting already.",
            kinds.MICROSECONDS,
            key="max_queue_delay_us",
        ),
    ] = 0.0


ALONE = BatchPolicy()
"""Each request runs alone."""
