"""HOOK: forward hooks and pre-hooks on the untouched model, stopping after the last capture."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layertap.extraction.points import CapturePoint, Sink
from layertap.extraction.taps import Taps
from layertap.models import LoadedModel

__all__ = ["HookExtractor"]


class HookExtractor:
    """Serves every module that runs, outputs and inputs, of any eager model. The oracle."""

    def __init__(self, model: LoadedModel, taps: Taps, points: Sequence[CapturePoint]) -> None:
        self._model = model
        self._taps = taps
        self._points = tuple(points)

    def run(self, x: torch.Tensor, sink: Sink) -> None:
        """See BuiltExtractor."""
        self._taps.run(self._model.forward, x, self._points, sink)
