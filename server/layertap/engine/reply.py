"""The reply path: captured values go straight into the message that will be sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from layertap.engine.resolve import Output
from layertap.engine.staging import Staging
from layertap.errors import ExtractorUnsupportedError, InvalidInputError, ReplyTooLargeError
from layertap.extraction.points import ValueSpec
from layertap.extraction.reductions import Reduced, reduced
from layertap.selection import Reduction
from layertap.wire.codec import MAX_MESSAGE_BYTES
from layertap.wire.dtypes import DTYPES, DType
from layertap.wire.messages import Timings
from layertap.wire.reply_form import MessageBuilder, ReplyForm

__all__ = ["Envelope", "Reply", "ReplyCollector", "ReplyWriter", "ShapeChangedError", "host_array"]


@dataclass(frozen=True, slots=True)
class Envelope:
    """What goes around a reply's tensors, and how large it all may be.

    Attributes:
        max_bytes: The limit of the message.
        form: Lays the message out.
        admit: Called with the bytes that the form takes before they are allocated; raises
            OverloadedError to refuse them.
    """

    max_bytes: int
    form: ReplyForm
    admit: Callable[[int], object]


_ROWS = {getattr(torch, row.name): row for row in DTYPES}


class ShapeChangedError(BaseException):
    """A value has not the shape that its plan predicts, so its model is a dynamic one.

    A BaseException, since it crosses the model's own forward, which may catch Exception.
    """


class ReplyWriter:
    """A sink that writes each value into its place in an unpublished reply.

    On the CPU the copy out of the activation, the cast and the serialization are one pass; no clone
    is made. What a GPU computed is written by ``finish``, see Note [Staging].

    Args:
        outputs: The tensors of the reply.
        specs: The type and shape of each captured point.
        batch_shape: Sizes of the input, ``[B, ...]``.
        envelope: What goes around the tensors, and how large it all may be.
        staging: Copies values of a GPU to the host; None writes each value at once, wherever it is.

    Raises:
        ReplyTooLargeError: Before any compute, from the predicted shapes.
        OverloadedError: Where there is no room for another reply.
        InvalidInputError: Where a reduction does not fit its layer.
        ExtractorUnsupportedError: Where a layer's type can't be sent.
    """

    def __init__(
        self,
        outputs: Sequence[Output],
        specs: Sequence[ValueSpec],
        batch_shape: Sequence[int],
        envelope: Envelope,
        staging: Staging | None = None,
    ) -> None:
        batch, *item_shape = batch_shape
        made = _reductions(outputs, specs, item_shape)
        values = [(each.spec.shape(batch), each.spec.dtype) for each in made]
        if staging is not None:
            envelope.admit(sum(math.prod(shape) * dtype.itemsize for shape, dtype in values))
        self._staging = staging
        self._staged: dict[int, torch.Tensor] = {}
        self._builder = _builder(outputs, values, envelope)
        self._form = envelope.form
        self._expected = [(spec.shape(batch), spec.dtype) for spec in specs]
        self._slots: dict[int, list[tuple[int, Reduced]]] = {}
        for slot, output in enumerate(outputs):
            self._slots.setdefault(output.point, []).append((slot, made[slot]))

    def __call__(self, point: int, value: torch.Tensor) -> None:
        """Write every output that is made of a point's value, or begin to copy it to the host."""
        if (tuple(value.shape), value.dtype) != self._expected[point]:
            raise ShapeChangedError
        for slot, reduction in self._slots[point]:
            made = reduction.apply(value)
            if self._staging is None:
                _write(self._builder, slot, made)
            else:
                self._staged[slot] = self._staging.take(made)

    def finish(self, timings: Timings) -> bytes:
        """Publish the message; what a GPU computed is written now, and must be on the host."""
        for slot, value in self._staged.items():
            _write(self._builder, slot, value)
        return self._builder.finish(self._form.head(timings))


class ReplyCollector:
    """A sink for values whose shapes are known only once they are there: it keeps clones.

    Detection models, whose outputs depend on what they see, are served this way; the limit can be
    checked only after the forward pass. Arguments and errors are ReplyWriter's.
    """

    def __init__(
        self,
        outputs: Sequence[Output],
        specs: Sequence[ValueSpec],
        batch_shape: Sequence[int],
        envelope: Envelope,
        staging: Staging | None = None,
    ) -> None:
        batch, *item_shape = batch_shape
        self._staging = staging
        # A reduction needs a shape to rely on: refused before any compute.
        self._made = _reductions(outputs, specs, item_shape)
        self._expected = [spec.shape(batch) for spec in specs]
        self._outputs = outputs
        self._envelope = envelope
        self._values: dict[int, torch.Tensor] = {}

    def __call__(self, point: int, value: torch.Tensor) -> None:
        """Keep a clone of every output that is made of a point's value."""
        for slot, output in enumerate(self._outputs):
            if output.point != point:
                continue
            if output.reduction is not Reduction.NONE and value.shape != self._expected[point]:
                raise InvalidInputError(
                    f"reduction: the size of layer {output.layer!r} depends on the content, "
                    f"{output.reduction.name} needs one to rely on"
                )
            made = self._made[slot].apply(value)
            self._values[slot] = made.clone() if self._staging is None else self._staging.take(made)

    def finish(self, timings: Timings) -> bytes:
        """Lay the message out by what was captured, write and publish it."""
        values = [self._values[slot] for slot in range(len(self._outputs))]
        shapes = [(tuple(value.shape), value.dtype) for value in values]
        builder = _builder(self._outputs, shapes, self._envelope)
        for slot, value in enumerate(values):
            _write(builder, slot, value)
        return builder.finish(self._envelope.form.head(timings))


Reply = ReplyWriter | ReplyCollector


def _reductions(
    outputs: Sequence[Output], specs: Sequence[ValueSpec], item_shape: Sequence[int]
) -> list[Reduced]:
    return [reduced(specs[o.point], o.reduction, o.layer, item_shape) for o in outputs]


def _builder(
    outputs: Sequence[Output],
    values: Sequence[tuple[tuple[int, ...], torch.dtype]],
    envelope: Envelope,
) -> MessageBuilder:
    tensors = [
        (output.name, _sent_as(output, dtype).number, shape)
        for output, (shape, dtype) in zip(outputs, values, strict=True)
    ]
    limit = min(envelope.max_bytes, MAX_MESSAGE_BYTES)
    try:
        layout = envelope.form.lay_out(tensors)
    except ValueError:
        raise ReplyTooLargeError(_too_large("over 2 GiB", limit)) from None
    if layout.nbytes > limit:
        raise ReplyTooLargeError(_too_large(f"{layout.nbytes} bytes", limit))
    return envelope.form.builder(layout, envelope.admit)


def _write(builder: MessageBuilder, slot: int, value: torch.Tensor) -> None:
    builder.write(slot, host_array(value), _ROWS[value.dtype].number)


def _too_large(predicted: str, limit: int) -> str:
    return (
        f"reply: {predicted} predicted, limit {limit} bytes; ask for fewer layers or items, "
        f"a reduction such as GLOBAL_AVERAGE_POOL, or dtype FLOAT16"
    )


def _sent_as(output: Output, dtype: torch.dtype) -> DType:
    row = _ROWS.get(dtype)
    if row is None:
        raise ExtractorUnsupportedError(
            f"layer {output.layer!r} is {dtype}, a type that the protocol does not carry"
        )
    if output.dtype is None or not row.is_float:
        return row
    return output.dtype


def host_array(value: torch.Tensor) -> np.ndarray:
    """Return a numpy view of a tensor's memory; bfloat16, which numpy lacks, as its bits."""
    value = value.detach()
    if value.device.type != "cpu":
        value = value.cpu()
    if value.dtype is torch.bfloat16:
        value = value.view(torch.uint16)
    return value.resolve_conj().resolve_neg().numpy()
