"""Decides which requests may share passes with items of other lengths, and divides requests.

See Note [Lengths in one pass] in ``layertap.extraction.padding``. Such passes run by the reference
kind: a compiled plan is for one length and one outcome of the model's looks at the mask, and
padding changes both.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from layertap.batching.batcher import MAX_PADDING
from layertap.call import Call
from layertap.extraction.catalogue import Catalogue
from layertap.extraction.padding import TokenAxis
from layertap.extraction.padding_proof import PADDING_TOLERANCE, PaddingFindings
from layertap.extraction.pass_spec import PassSpec
from layertap.listing import listed
from layertap.models import Batch
from layertap.selection import Capture
from layertap.settings import BatchPolicy

__all__ = ["Lengths", "Padding"]

_log = logging.getLogger(__name__)

MAX_LISTED = 8
"""Layers that must not be padded that a note lists by name."""

Prove = Callable[[Sequence[str], Call], PaddingFindings]
"""Tests the layers of a model, for requests that give some inputs."""


@dataclass(frozen=True, slots=True)
class Padding:
    """How the items of a request may be padded, in layers for which that was tested.

    Attributes:
        key: Equal for requests whose items may share a pass.
        axis: The dimension of the inputs along which they are padded.
        length: The length of the request's tensors.
        axes: For each point, the dimensions of its value that have this length.
        max_length: The length up to which this was tested.
        items: The number of items up to which this was tested.
    """

    key: Hashable
    axis: TokenAxis
    length: int
    axes: Sequence[tuple[int, ...]]
    max_length: int
    items: int

    def parts(self, lengths: np.ndarray, policy: BatchPolicy) -> list[np.ndarray]:
        """Divide items into passes of similar lengths, the longest items first.

        Args:
            lengths: The length of each item, int64 ``[B]``.
            policy: How many tokens a pass may have.

        Returns:
            For each pass, the indices of its items; the first one is the longest.
        """
        order = np.argsort(-lengths, kind="stable")
        parts, begin = [], 0
        while begin < len(order):
            longest, end, own = int(lengths[order[begin]]), begin + 1, int(lengths[order[begin]])
            most = min(policy.max_tokens // longest, self.items)
            while end < len(order) and end - begin < most and longest <= self.max_length:
                tokens = longest * (end + 1 - begin)
                own += int(lengths[order[end]])
                if tokens - own > MAX_PADDING * tokens:
                    break
                end += 1
            parts.append(order[begin:end])
            begin = end
        return parts


class Lengths:
    """What is known about the padding of one model. Safe to share between threads.

    Args:
        axis: The dimension along which its inputs are padded.
        catalogue: The model's catalogue.
        prove: Tests its layers; may take as long as several passes.
        names: The inputs of usual requests, for which the layers are tested now.
        call: Cancels the test.
    """

    def __init__(
        self,
        axis: TokenAxis,
        catalogue: Catalogue,
        prove: Prove,
        names: tuple[str, ...],
        call: Call,
    ) -> None:
        self._axis = axis
        self._catalogue = catalogue
        self._prove = prove
        self._lock = threading.Lock()
        self._found: dict[tuple[str, ...], PaddingFindings] = {}
        self.note = self._in_words(self._findings(names, call))
        _log.info("model %s: %s", axis.model.name, self.note)

    def padding(self, pass_spec: PassSpec, x: Batch, call: Call) -> Padding | None:
        """Return how a request may be padded; None if it must not be.

        Args:
            pass_spec: What its pass captures.
            x: Its batch, on the CPU.
            call: The deadline and cancellation state of the request.
        """
        key = self._axis.model.signature.key_of(x)
        length = self._axis.length(key)
        if not length or not self._axis.pads_on_the_right(x):
            return None
        found = self._findings(tuple(item.name for item in key.items), call)
        if not found.length or not all(point in found.axes for point in pass_spec.points):
            return None
        return Padding(
            (id(self), pass_spec, self._axis.key_of_any_length(key)),
            self._axis,
            length,
            [found.axes[point] for point in pass_spec.points],
            found.length,
            found.items,
        )

    def _findings(self, names: tuple[str, ...], call: Call) -> PaddingFindings:
        with self._lock:
            found = self._found.get(names)
        if found is None:
            # Two requests may do this at once, with the same result.
            found = self._prove(names, call)
            with self._lock:
                self._found[names] = found
        return found

    def _in_words(self, found: PaddingFindings) -> str:
        """Return a sentence for the model's description."""
        names = self._catalogue.names
        refused = [(names[p], why) for p, why in found.refusals.items() if p in names]
        kept = [names[point] for point in found.axes if point in names]
        outputs = sum(not name.endswith(f":{Capture.INPUT}") for name in kept)
        if not kept:
            why = next((why for _, why in refused), "it has no layer that can be padded")
            return f"items of different lengths never share a pass: {why}"
        share = PADDING_TOLERANCE[torch.float32]
        words = (
            f"items of different lengths up to {found.length} share passes in {outputs} layers, "
            f"whose values change by at most {share:.0e} of their magnitude in float32"
        )
        if not refused:
            return words
        left_out = listed((f"{name!r} ({why})" for name, why in refused), MAX_LISTED)
        return f"{words}; not in {left_out}"
