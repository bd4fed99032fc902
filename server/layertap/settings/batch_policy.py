"""How requests are grouped into batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from layertap.settings import value_kinds as kinds
from layertap.settings.definition import Setting

__all__ = ["ALONE", "BatchPolicy"]

AUTO_ITEMS = 8
"""The most items of a shared pass where ``batching = "auto"`` stands alone."""


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """How many items a batch may have, and how many seconds it may wait for more."""

    max_size: Annotated[
        int,
        Setting(
            "Most items, of several requests together, in one forward pass; 1 runs each request "
            'alone, and with batching = "auto" stands for 8. A larger request runs alone too.',
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
    sharing: Annotated[
        str,
        Setting(
            "Whether requests share forward passes of up to max_batch_size items: on; off; or "
            "auto, for those plans for which the server has measured that shared passes give more "
            "items per second.",
            kinds.choice("on", "auto", "off"),
            key="batching",
        ),
    ] = "on"

    @property
    def most(self) -> int:
        """The most items of several requests in one forward pass; 1 if none ever share one."""
        if self.sharing == "off":
            return 1
        return AUTO_ITEMS if self.sharing == "auto" and self.max_size == 1 else self.max_size

    @property
    def measured(self) -> bool:
        """Whether measurements decide which plans share passes."""
        return self.sharing == "auto"

    def together(self) -> BatchPolicy:
        """Return the policy of requests that share passes: as ``on``, with ``most`` items."""
        return replace(self, max_size=self.most, sharing="on")

    def alone(self) -> BatchPolicy:
        """Return the policy of requests that share no pass."""
        return replace(self, max_size=1, sharing="on")


ALONE = BatchPolicy()
"""Each request runs alone."""
