"""The interface of a built extractor."""

from __future__ import annotations

from typing import Protocol

import torch

from layertap.extraction.points import Sink
from layertap.models import Batch

__all__ = ["BuiltExtractor", "Values"]

Values = list[torch.Tensor]
"""One value per capture point, in the order of the points."""


class BuiltExtractor(Protocol):
    """An extractor for a fixed list of capture points, ready to run."""

    def run(self, x: Batch, sink: Sink) -> None:
        """Run the model on a batch and pass the value of each point to ``sink``, once.

        Args:
            x: The batch, on the model's device and with the dtypes of the model's inputs.
            sink: Called with (index of the point, its tensor) before the tensor can be overwritten.
        """
        ...
