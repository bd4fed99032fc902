"""The interface of a built extractor."""

from __future__ import annotations

from typing import Protocol

import torch

from layertap.extraction.points import Sink
from layertap.models import Batch

__all__ = ["BuiltExtractor", "Values"]

Values = list[torch.Tensor]
"""A value for each point, in the order of the points."""


class BuiltExtractor(Protocol):
    """One way to capture a fixed list of points, ready to run."""

    def run(self, x: Batch, sink: Sink) -> None:
        """Run the model on a batch and hand every point's value to ``sink``, each once.

        Args:
            x: On the model's device, of its inputs' element types.
            sink: Called with (index of the point, its tensor) while the tensor is live.
        """
        ...
