"""Lays a reply out before the forward pass, from the shapes that the plan predicts.

This way a reply that would be too large is refused before any compute, and values can be written
to their places while the pass runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic

import numpy as np
import torch

from layertap.engine.making import Made, Making, Needed, made_of
from layertap.engine.reply import ROWS, ReplyCollector, ReplyWriter, TensorType
from layertap.engine.reply_form import P, ReplyBuilder, ReplyForm
from layertap.engine.resolve import Output
from layertap.engine.staging import Staging
from layertap.errors import ExtractorUnsupportedError, InvalidInputError, ReplyTooLargeError
from layertap.extraction.masked import Tokens
from layertap.extraction.plan import Plan
from layertap.extraction.projecting import Matrix
from layertap.wire.dtypes import DType, of_array

__all__ = [
    "NOTHING_BESIDE",
    "Beside",
    "Envelope",
    "all_made",
    "reply_collector",
    "reply_writer",
]


@dataclass(frozen=True, slots=True)
class Beside:
    """Data of a request that is not in its batch.

    Attributes:
        tokens: Which positions of its texts count, for reductions; None if all do.
        arrays: Further tensors of the reply, by name, which are known before the pass.
        pictures: The images that the model is given, for overlays; None if there are none.
        matrices: What its projections multiply by.
    """

    tokens: Tokens | None = None
    arrays: Sequence[tuple[str, np.ndarray]] = ()
    pictures: torch.Tensor | None = None
    matrices: Sequence[Matrix] = ()

    def repeated(self, times: int) -> Beside:
        """Return the data for a reply that has all items several times."""
        return self if self.tokens is None else replace(self, tokens=self.tokens.repeated(times))


NOTHING_BESIDE = Beside()


@dataclass(frozen=True, slots=True)
class Envelope(Generic[P]):
    """The form of a reply and the limits on its size.

    Attributes:
        max_bytes: The limit of the reply.
        form: Lays out the reply.
        admit: Called before allocating, with the bytes that the form needs. Raises
            OverloadedError if they would exceed the limit.
    """

    max_bytes: int
    form: ReplyForm[P]
    admit: Callable[[int], object]


def reply_writer(
    outputs: Sequence[Output],
    plan: Plan,
    size: int,
    envelope: Envelope[P],
    staging: Staging | None = None,
    *,
    beside: Beside = NOTHING_BESIDE,
) -> ReplyWriter[P]:
    """Lay out and allocate the reply for a plan with known shapes.

    Args:
        outputs: The tensors of the reply.
        plan: The plan, which predicts the dtype and shape of each captured point.
        size: The number of items in the batch.
        envelope: The form of the reply and the limits on its size.
        staging: Copies values from a GPU to the host; if None, each value is written at once.
        beside: Data of the request that is not in its batch.

    Raises:
        ReplyTooLargeError: If the reply would exceed its limit.
        OverloadedError: If there is no memory for another reply.
        InvalidInputError: If a reduction does not fit its layer.
        ExtractorUnsupportedError: If a layer's dtype can't be sent.
    """
    made = all_made(outputs, plan, beside)
    values = [(each.spec.shape(size), each.spec.dtype) for each in made]
    _admit_scratch(made, size, envelope)
    if staging is not None:
        envelope.admit(sum(math.prod(shape) * dtype.itemsize for shape, dtype in values))
    slots: dict[int, list[tuple[int, int]]] = {}
    for slot, output in enumerate(outputs):
        for number, member in enumerate(output.members):
            slots.setdefault(member.point, []).append((slot, number))
    builder = _builder(outputs, envelope, beside, values)
    expected = [(spec.shape(size), spec.dtype) for spec in plan.specs]
    return ReplyWriter(builder, expected, slots, Making(made, size), staging)


def reply_collector(
    outputs: Sequence[Output],
    plan: Plan,
    size: int,
    envelope: Envelope[P],
    staging: Staging | None = None,
    *,
    beside: Beside = NOTHING_BESIDE,
) -> ReplyCollector[P]:
    """Prepare the reply for a plan whose shapes depend on the content; it is laid out at the end.

    See ``reply_writer`` for arguments and errors. The first two errors are raised at the end.
    """
    # Check the reductions now: one that needs a fixed shape is then refused before any compute.
    made = all_made(outputs, plan, beside)
    _admit_scratch(made, size, envelope)
    expected = [spec.shape(size) for spec in plan.specs]
    return ReplyCollector(
        outputs, Making(made, size), expected, partial(_builder, outputs, envelope, beside), staging
    )


def all_made(outputs: Sequence[Output], plan: Plan, beside: Beside) -> list[Made]:
    """Return how each output of a plan is made.

    Raises:
        InvalidInputError: If something can't be made of the values; see ``made_of``.
    """
    needed = Needed(plan.batch_key, beside.tokens, beside.pictures, beside.matrices)
    return [made_of(output, plan.specs, needed) for output in outputs]


def _admit_scratch(made: Sequence[Made], size: int, envelope: Envelope[P]) -> None:
    """Reserve the memory that the making of outputs takes besides the reply.

    Raises:
        ReplyTooLargeError: If it would exceed the limit of the reply.
        OverloadedError: If there is no memory for it.
    """
    scratch = sum(each.scratch_bytes(size) for each in made)
    if scratch > envelope.max_bytes:
        raise ReplyTooLargeError(
            f"reply: {scratch} bytes of values before they are projected or concatenated, limit "
            f"{envelope.max_bytes} bytes; request fewer items, or a smaller grid"
        )
    if scratch:
        envelope.admit(scratch)


def _builder(
    outputs: Sequence[Output],
    envelope: Envelope[P],
    beside: Beside,
    values: Sequence[TensorType],
) -> ReplyBuilder[P]:
    tensors = [
        (output.name, _sent_as(output, dtype).number, shape)
        for output, (shape, dtype) in zip(outputs, values, strict=True)
    ]
    more = [(name, of_array(array).number, array.shape) for name, array in beside.arrays]
    _check_names(outputs, [name for name, _, _ in more])
    limit = envelope.max_bytes
    try:
        nbytes = envelope.form.lay_out([*tensors, *more])
    except ValueError:
        raise ReplyTooLargeError(_too_large("over 2 GiB", limit)) from None
    if nbytes > limit:
        raise ReplyTooLargeError(_too_large(f"{nbytes} bytes", limit))
    builder = envelope.form.builder(envelope.admit)
    for index, (_, array) in enumerate(beside.arrays, len(tensors)):
        builder.write(index, array, of_array(array).number)
    return builder


def _check_names(outputs: Sequence[Output], more: Sequence[str]) -> None:
    taken = [output.name for output in outputs if output.name in more]
    if taken:
        raise InvalidInputError(
            f"layers: got {taken[0]!r} as the name of an output, which the tokens of the texts "
            f"have; give the layer an alias"
        )


def _too_large(predicted: str, limit: int) -> str:
    return (
        f"reply: {predicted} predicted, limit {limit} bytes; request fewer layers or items, "
        f"a reduction such as GLOBAL_AVERAGE_POOL, or dtype FLOAT16"
    )


def _sent_as(output: Output, dtype: torch.dtype) -> DType:
    row = ROWS.get(dtype)
    if row is None:
        raise ExtractorUnsupportedError(
            f"layer {output.layer!r} is {dtype}, a dtype that layertap can't return"
        )
    if output.dtype is None or not row.is_float:
        return row
    return output.dtype
