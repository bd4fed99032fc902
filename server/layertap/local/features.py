"""The result of an extraction in this process: named tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import torch

from layertap.engine.reply import host_array
from layertap.selection import Extractor
from layertap.timings import Timings

__all__ = ["LocalFeatures"]


class LocalFeatures(Mapping[str, torch.Tensor]):
    """The layers of one extraction by name, in the order of the request.

    Each is a contiguous tensor on the CPU, in the layer's own dtype unless the selection names
    another one. The tensors belong to the caller: nothing else refers to their memory, and they may
    be written to. They can be pickled.

    Attributes:
        extractor: The extractor that served the request; never AUTO.
        variant: How its program is finished, such as ``"channels_last"``; empty for the usual way.
        timings: How long each part took, in nanoseconds.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        extractor: Extractor,
        variant: str,
        timings: Timings,
    ) -> None:
        self._tensors = dict(tensors)
        self.extractor = extractor
        self.variant = variant
        self.timings = timings

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return the tensor of a layer."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._tensors)

    def __repr__(self) -> str:
        """Show each layer's name, dtype and shape."""
        shapes = ", ".join(
            f"{name}: {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            for name, tensor in self.items()
        )
        return f"LocalFeatures({shapes})"

    def numpy(self) -> dict[str, np.ndarray]:
        """Return the layers as numpy arrays that share the tensors' memory.

        bfloat16 arrays have the dtype of the ``ml_dtypes`` package, as in `Features`.
        """
        return {name: _array(tensor) for name, tensor in self.items()}


def _array(tensor: torch.Tensor) -> np.ndarray:
    array = host_array(tensor)
    return array.view(ml_dtypes.bfloat16) if tensor.dtype is torch.bfloat16 else array
