"""The form of a reply to a caller in the same process: torch tensors by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from layertap.engine.reply import host_array
from layertap.engine.reply_form import NamedTensor
from layertap.selection import Extractor
from layertap.timings import Timings
from layertap.wire import codec
from layertap.wire.dtypes import by_number

__all__ = ["TensorForm"]


class TensorForm:
    """Writes each value into a new torch tensor, a ``layertap.engine.reply_form.ReplyForm``.

    The tensors are contiguous, on the CPU, and share no memory. Values are cast by the same code
    as in a server's replies, so both have the same bits.

    Args:
        extractor: The extractor that serves the request; it doesn't affect this form.
        variant: How its program is finished; it doesn't affect this form either.
    """

    shared_bytes = 0

    def __init__(self, extractor: Extractor, variant: str = "") -> None:
        self._tensors: Sequence[NamedTensor] = ()

    def lay_out(self, tensors: Sequence[NamedTensor]) -> int:
        """See ``ReplyForm``; returns the bytes of the tensors."""
        self._tensors = tensors
        return sum(
            math.prod(shape) * by_number(number).itemsize for _, number, shape in self._tensors
        )

    def builder(self, admit: Callable[[int], object]) -> _TensorBuilder:
        """See ``ReplyForm``."""
        admit(self.lay_out(self._tensors))
        return _TensorBuilder(self._tensors)

    def head(self, timings: Timings) -> bytes:
        """Return no bytes: the `Extraction` has the timings."""
        return b""

    def nbytes(self, payload: dict[str, torch.Tensor]) -> int:
        """See ``ReplyForm``."""
        return sum(tensor.nbytes for tensor in payload.values())


class _TensorBuilder:
    """Writes a reply's values into tensors; see ``ReplyBuilder``.

    The codec copies and casts each value in one pass without the GIL, as it does for messages. It
    writes to a tensor's memory as if this were the payload of a message's only tensor.
    """

    def __init__(self, tensors: Sequence[NamedTensor]) -> None:
        self._made: dict[str, torch.Tensor] = {}
        self._writers: list[codec.ReplyBuilder | None] = []
        for name, number, shape in tensors:
            # Not an inference tensor, whatever mode the caller is in, as autograd can't use those.
            with torch.inference_mode(False):
                made = torch.empty(shape, dtype=getattr(torch, by_number(number).name))
            self._made[name] = made
            self._writers.append(_writer(made, number, shape) if made.numel() else None)

    def write(self, index: int, array: Any, dtype: int) -> None:
        """See ``ReplyBuilder``."""
        writer = self._writers[index]
        if writer is not None:
            writer.write(0, array, dtype)

    def finish(self, head: bytes) -> dict[str, torch.Tensor]:
        """See ``ReplyBuilder``."""
        for writer in self._writers:
            if writer is not None:
                writer.finish(head)  # Raises ValueError if the tensor was never written.
        return self._made


def _writer(made: torch.Tensor, number: int, shape: tuple[int, ...]) -> codec.ReplyBuilder:
    layout = codec.ReplyLayout([("", number, shape)], field=1, head_size=0, apart=True)
    memory = host_array(made).reshape(-1).view(np.uint8)
    return codec.ReplyBuilder(layout, memoryview(memory))
