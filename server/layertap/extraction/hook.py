"""HOOK: forward hooks and pre-hooks on the untouched model, stopping after the last capture."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layertap.extraction.passes import PassGuard
from layertap.extraction.points import CapturePoint, Sink
from layertap.extraction.taps import Taps
from layertap.models import LoadedModel

__all__ = ["HookExtractor"]


class HookExtractor:
    """Serves every module that runs, outputs and inputs, of any eager model. The oracle.

    Args:
        model: The model.
        taps: Its taps.
        points: What to capture.
        guard: The model's guard, held in each pass.
        oracle: Whether what it captures proves other extractors: its passes then run to their end,
            and are looked at for state that no pass wrote before.
    """

    def __init__(
        self,
        model: LoadedModel,
        taps: Taps,
        points: Sequence[CapturePoint],
        guard: PassGuard,
        *,
        oracle: bool = False,
    ) -> None:
        self._model = model
        self._taps = taps
        self._points = tuple(points)
        self._guard = guard
        self._oracle = oracle

    def run(self, x: torch.Tensor, sink: Sink) -> None:
        """See BuiltExtractor."""
        with self._guard as guard:
            to_end = self._oracle or not guard.rules.early_stop
            threads = guard.rules.own_threads
            self._taps.run(
                self._model.forward, x, self._points, sink, to_end=to_end, own_threads=threads
            )
            if self._oracle:
                guard.learn(self._model.name)
