"""The result of an extraction: named arrays, views of the received message or of shared memory."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

import numpy as np

from layertap.selection import Extractor
from layertap.timings import Timings
from layertap.v1 import catalogue_pb2
from layertap.v1.feature_service_pb2 import ExtractResponse, ExtractStreamResponse
from layertap.wire import dtypes
from layertap.wire.enums import from_proto
from layertap.wire.messages import Find, decode_reply
from layertap.wire.tensors import TensorView

if TYPE_CHECKING:
    import torch

__all__ = ["Features"]


class Features(Mapping[str, np.ndarray]):
    """The layers of one reply, by name, in the order of the request.

    The arrays are read-only views of the message, or of memory shared with a server on this machine
    (docs/shared_memory.md); ``array.copy()`` makes a writable copy. bfloat16 arrays have the dtype
    of the ``ml_dtypes`` package.

    Pickling copies the values, including those in shared memory. With protocol 5 and a
    ``buffer_callback`` it passes them on without a copy.

    Attributes:
        extractor: The extractor that served the request.
        variant: How its program is finished, such as ``"channels_last"``; empty for the usual way.
        timings: How long each phase took on the server, in nanoseconds.
    """

    def __init__(self, message: bytes, find: Find | None = None) -> None:
        self._take(*decode_reply(message, find))

    @classmethod
    def of_stream(cls, reply: ExtractStreamResponse, tensors: Sequence[TensorView]) -> Self:
        """Return the layers of a parsed reply of a stream."""
        features = cls.__new__(cls)
        features._take(reply, tensors)
        return features

    def _take(
        self, response: ExtractResponse | ExtractStreamResponse, tensors: Sequence[TensorView]
    ) -> None:
        self.extractor = from_proto(
            response.extractor, catalogue_pb2.Extractor, "EXTRACTOR", Extractor.AUTO
        )
        self.variant = response.variant
        self.timings = Timings(
            prepare_ns=response.timings.prepare_ns,
            queue_ns=response.timings.queue_ns,
            compute_ns=response.timings.compute_ns,
            total_ns=response.timings.total_ns,
        )
        self._views: dict[str, TensorView] = {view.name: view for view in tensors}

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a layer as a read-only array."""
        return self._views[name].array()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._views)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._views)

    def __repr__(self) -> str:
        """Show each layer's name, dtype and shape."""
        shapes = ", ".join(f"{v.name}: {v.dtype.name}{list(v.shape)}" for v in self._views.values())
        return f"Features({shapes})"

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """Pickle the values as they are in the message, without the message itself."""
        wrap: Any = pickle.PickleBuffer if int(protocol) >= 5 else bytes
        tensors = [
            (view.name, view.dtype.number, view.shape, wrap(view.data))
            for view in self._views.values()
        ]
        return _unpickled, (type(self), self.extractor, self.variant, self.timings, tensors)

    def torch(self) -> dict[str, torch.Tensor]:
        """Return the layers as torch tensors that share the message's memory.

        Writes are visible in other views of the same layer, and nowhere else. Values in shared
        memory are mapped a second time to make them writable: these tensors share memory with each
        other, but not with the arrays.

        Raises:
            ImportError: If torch is not installed.
        """
        from layertap.client.to_torch import to_torch

        return {name: to_torch(view) for name, view in self._views.items()}


def _unpickled(
    kind: type[Features],
    extractor: Extractor,
    variant: str,
    timings: Timings,
    tensors: Sequence[tuple[str, int, tuple[int, ...], Any]],
) -> Features:
    features = kind.__new__(kind)
    features.extractor = extractor
    features.variant = variant
    features.timings = timings
    features._views = {
        name: TensorView(name, dtypes.by_number(number), shape, memoryview(data).toreadonly())
        for name, number, shape, data in tensors
    }
    return features
