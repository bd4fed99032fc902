"""Writes captured values directly into the reply that the caller will get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import numpy as np
import torch

from layertap.engine.making import Making
from layertap.engine.reply_form import P, ReplyBuilder
from layertap.engine.resolve import Output
from layertap.engine.staging import Staging
from layertap.errors import InvalidInputError
from layertap.wire.dtypes import DTYPES

__all__ = [
    "ROWS",
    "Reply",
    "ReplyCollector",
    "ReplyWriter",
    "ShapeChangedError",
    "TensorType",
    "host_array",
]

ROWS = {getattr(torch, row.name): row for row in DTYPES}
"""The row of the dtype table for each torch dtype that the protocol has."""

TensorType = tuple[tuple[int, ...], torch.dtype]
"""The shape and dtype of a value."""


class ShapeChangedError(BaseException):
    """A value's shape or dtype is not the one that the plan predicts, so the plan is dynamic.

    It is a BaseException because it passes through the model's own forward, which may catch
    Exception.
    """


@dataclass(eq=False, slots=True)
class ReplyWriter(Generic[P]):
    """A sink that writes each value into its place in an unfinished reply.

    On the CPU, copying out of the activation, casting and serializing happen in one pass, without a
    clone. Values on a GPU are written by ``complete``; see Note [Staging].

    Attributes:
        builder: The reply.
        expected: The shape and dtype of each captured point.
        slots: For each point, the tensors of the reply that are made from it: their index in the
            reply, and which of their layers it is.
        making: Makes the tensors from values.
        staging: Copies values from a GPU to the host; if None, each value is written at once.
    """

    builder: ReplyBuilder[P]
    expected: Sequence[TensorType]
    slots: Mapping[int, Sequence[tuple[int, int]]]
    making: Making
    staging: Staging | None = None
    _staged: dict[int, torch.Tensor] = field(default_factory=dict)

    def __call__(self, point: int, value: torch.Tensor) -> None:
        """Write the outputs that are made from a point's value, or begin to copy it to the host."""
        if (tuple(value.shape), value.dtype) != self.expected[point]:
            raise ShapeChangedError
        for slot, member in self.slots[point]:
            made = self.making.take(slot, member, value)
            if made is None:
                continue
            if self.staging is None:
                _write(self.builder, slot, made)
            else:
                self._staged[slot] = self.staging.take(made)

    def complete(self) -> ReplyBuilder[P]:
        """Write the values from a GPU, which must be on the host by now; return the reply."""
        for slot, value in self._staged.items():
            _write(self.builder, slot, value)
        return self.builder


@dataclass(eq=False, slots=True)
class ReplyCollector(Generic[P]):
    """A sink for values whose shapes are known only after the pass: it keeps clones.

    It serves models such as detectors, whose output shapes depend on the image. The limit of a
    reply can be checked only after the forward pass.

    Attributes:
        outputs: The tensors of the reply.
        making: Makes the outputs from values.
        expected: The predicted shape of each captured point.
        lay_out: Returns the builder of the reply, given the shapes and dtypes of all outputs.
        staging: Copies values from a GPU to the host; if None, each value is cloned where it is.
    """

    outputs: Sequence[Output]
    making: Making
    expected: Sequence[tuple[int, ...]]
    lay_out: Callable[[Sequence[TensorType]], ReplyBuilder[P]]
    staging: Staging | None = None
    _values: dict[int, torch.Tensor] = field(default_factory=dict)

    def __call__(self, point: int, value: torch.Tensor) -> None:
        """Keep a clone of each output that is made from a point's value."""
        for slot, member, output in self._made_from(point):
            if output.needs_shape and value.shape != self.expected[point]:
                raise InvalidInputError(
                    f"{output.asked}: the size of layer {output.layer!r} depends on the content, "
                    f"but this needs a fixed size"
                )
            made = self.making.take(slot, member, value)
            if made is not None:
                self._values[slot] = (
                    made.clone() if self.staging is None else self.staging.take(made)
                )

    def _made_from(self, point: int) -> Iterator[tuple[int, int, Output]]:
        for slot, output in enumerate(self.outputs):
            for number, member in enumerate(output.members):
                if member.point == point:
                    yield slot, number, output

    def complete(self) -> ReplyBuilder[P]:
        """Lay out the reply for the captured values and write them; return the reply."""
        values = [self._values[slot] for slot in range(len(self.outputs))]
        builder = self.lay_out([(tuple(value.shape), value.dtype) for value in values])
        for slot, value in enumerate(values):
            _write(builder, slot, value)
        return builder


Reply = ReplyWriter[P] | ReplyCollector[P]


def _write(builder: ReplyBuilder[Any], slot: int, value: torch.Tensor) -> None:
    builder.write(slot, host_array(value), ROWS[value.dtype].number)


def host_array(value: torch.Tensor) -> np.ndarray:
    """Return a numpy view of a tensor's memory; bfloat16 as uint16, because numpy lacks it."""
    value = value.detach()
    if value.device.type != "cpu":
        value = value.cpu()
    if value.dtype is torch.bfloat16:
        value = value.view(torch.uint16)
    return value.resolve_conj().resolve_neg().numpy()
