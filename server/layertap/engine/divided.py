"""Divides the texts of a request into several passes, and puts the reply together.

The items of each pass have similar lengths, so little is computed for padding. The values of each
pass are written to their places in whole tensors, which are then written into the reply.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from layertap.call import Call
from layertap.engine.compute import Part
from layertap.engine.host import ModelHost
from layertap.engine.lengths import Padding
from layertap.engine.reply import Reply, TensorType
from layertap.engine.reply_form import NamedTensor, ReplyBuilder
from layertap.engine.reply_layout import Beside, Envelope, all_made, reply_writer
from layertap.engine.resolve import Resolved
from layertap.engine.work import Work
from layertap.errors import ModelRunError
from layertap.extraction.masked import MASKED, Tokens
from layertap.extraction.plan import Plan
from layertap.extraction.points import ValueSpec
from layertap.models import Batch
from layertap.regrid import NO_REGRID
from layertap.selection import Reduction
from layertap.timings import Timings

__all__ = ["Assembly", "Division", "Place", "Planned", "divide"]


@dataclass(frozen=True)
class Place:
    """Where the items of a part go in one tensor of the reply.

    Attributes:
        shape: The shape of the whole tensor.
        rows: For each item, where its rows begin along ``axis``, and where they end: ``[B + 1]``
            where the rows of the items follow one another.
        axis: The dimension of the items.
        token_axes: The dimensions of the tokens; an item fills as many of each as it has tokens.
        lengths: The number of tokens of each item.
    """

    shape: tuple[int, ...]
    rows: np.ndarray
    axis: int = 0
    token_axes: tuple[int, ...] = ()
    lengths: Sequence[int] = ()

    def index(self, items: np.ndarray, part: Sequence[int]) -> tuple[Any, ...]:
        """Return the index of the whole tensor under which the values of a part belong.

        Args:
            items: The items of the part.
            part: The shape of its values.
        """
        rows = [np.arange(self.rows[item], self.rows[item + 1]) for item in items]
        index: list[Any] = [slice(None)] * len(self.shape)
        index[self.axis] = np.concatenate(rows)
        for axis in self.token_axes:
            index[axis] = slice(part[axis])
        return tuple(index)

    def padding(self, items: np.ndarray, part: Sequence[int]) -> Iterator[tuple[Any, ...]]:
        """Yield the indices of the whole tensor under which a part has padding; see ``index``."""
        for item in items if self.token_axes else ():
            for axis in self.token_axes:
                index: list[Any] = [slice(None)] * len(self.shape)
                index[self.axis] = slice(self.rows[item], self.rows[item + 1])
                index[axis] = slice(self.lengths[item], part[axis])
                yield tuple(index)


class Planned(NamedTuple):
    """A request that is ready to run.

    Attributes:
        x: Its batch, on the CPU.
        beside: Its data that is not in the batch.
        resolved: Its layers.
        plan: The plan for the batch.
        padding: How it may share passes with items of other lengths; None if it may not.
    """

    x: Batch
    beside: Beside
    resolved: Resolved
    plan: Plan
    padding: Padding | None = None


@dataclass(frozen=True)
class Division:
    """The passes of one request.

    Attributes:
        items: The indices of the items of each pass.
        lengths: The length of the longest item of each pass.
        assembly: Receives the values.
        nbytes: The bytes of the whole tensors.
    """

    items: Sequence[np.ndarray]
    lengths: Sequence[int]
    assembly: Assembly
    nbytes: int

    def parts(self, host: ModelHost, planned: Planned, call: Call) -> list[Part[Work[Any]]]:
        """Return the work of each pass."""
        return [
            self._part(host, planned, call, pair)
            for pair in zip(self.items, self.lengths, strict=True)
        ]

    def _part(
        self, host: ModelHost, planned: Planned, call: Call, pair: tuple[np.ndarray, int]
    ) -> Part[Work[Any]]:
        items, length = pair
        _, beside, resolved, _, padding = planned
        if padding is None:
            raise AssertionError("only requests that may be padded are divided")
        x = padding.axis.rows(planned.x, items, length)
        plan = host.plan(resolved, x, call)
        form = self.assembly.form(items)
        reply = reply_writer(
            resolved.outputs,
            plan,
            len(items),
            Envelope(_ANY_SIZE, form, lambda nbytes: None),
            host.staging,
            beside=_beside_part(beside, items, length),
        )
        padded = replace(padding, length=length)
        work = Work(host, plan, resolved, x, reply, _fail, call, padding=padded)
        return Part(work, len(items), length)


_ANY_SIZE = 1 << 62
"""A limit that no part exceeds: its bytes are counted with the whole reply."""


def _fail() -> Reply[Any]:
    """Fail a part whose values have other shapes than predicted; the request then runs whole."""
    raise ModelRunError("the shape of a value depends on the content, so it can't be divided")


def divide(host: ModelHost, planned: Planned) -> Division | None:
    """Divide a request of texts into passes; None if one pass is enough or it can't be divided.

    It can't be if a reduction would depend on the padding, or if the tokenizer pads every text to
    one length, which then belongs to the values.
    """
    x, beside, resolved, plan, padding = planned
    tokenizer = host.model.tokenizer
    if padding is None or beside.tokens is None or tokenizer is None or tokenizer.length:
        return None
    if any(tensor.dtype is torch.bfloat16 for tensor in x.values()):
        return None  # NumPy, which takes the items apart, has no such type.
    lengths: np.ndarray = beside.tokens.mask.numpy().sum(1)
    items = padding.parts(lengths, host.options.batching)
    if len(items) == 1:
        return None
    made = all_made(resolved.outputs, plan, beside)
    values = [(each.spec.shape(x.size), each.spec.dtype) for each in made]
    places = _places(planned, padding, values, lengths.tolist())
    if places is None:
        return None
    nbytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in values)
    return Division(items, [int(lengths[each[0]]) for each in items], Assembly(places), nbytes)


def _places(
    planned: Planned, padding: Padding, values: Sequence[TensorType], lengths: Sequence[int]
) -> list[Place] | None:
    """Return where parts go in each tensor; None if a reduction depends on the padding."""
    x, beside, resolved, plan, _ = planned
    found = []
    for output, (shape, _) in zip(resolved.outputs, values, strict=True):
        if len(output.members) > 1 or output.regrid != NO_REGRID:
            return None
        [(_, point)] = output.members
        spec, token_axes = plan.specs[point], padding.axes[point]
        if output.reduction is Reduction.NONE:
            axis, each = spec.batch_axis or (0, 1)
            rows = np.arange(x.size + 1) * each
            found.append(Place(shape, rows, axis, tuple(token_axes), lengths))
        elif output.reduction.ragged and beside.tokens is not None:
            ends = np.cumsum(_rows(output.reduction, beside.tokens))
            found.append(Place(shape, np.concatenate([[0], ends])))
        elif not token_axes or (output.reduction in MASKED and _is_series(spec, token_axes)):
            found.append(Place(shape, np.arange(x.size + 1)))
        else:
            return None
    return found


def _is_series(spec: ValueSpec, token_axes: tuple[int, ...]) -> bool:
    return token_axes == (1,) == spec.geometry.positions and len(spec.dims) == 3


def _rows(reduction: Reduction, tokens: Tokens) -> np.ndarray:
    """Return the number of rows of each item in a ragged tensor."""
    if reduction is Reduction.TOKENS or tokens.words is None:
        counts: np.ndarray = tokens.mask.numpy().sum(1)
        return counts
    words = tokens.words.numpy()
    return np.array([len(np.unique(row[row >= 0])) for row in words])


def _beside_part(beside: Beside, items: np.ndarray, length: int) -> Beside:
    """Return what belongs to a part of a request, without the tensors that the reply has once."""
    tokens = beside.tokens
    if tokens is None:
        return Beside(matrices=beside.matrices)
    words = None if tokens.words is None else tokens.words.numpy()[items, :length]
    mask = tokens.mask.numpy()[items, :length]
    own = Tokens(torch.from_numpy(mask), None if words is None else torch.from_numpy(words))
    return Beside(own, matrices=beside.matrices)


class Assembly:
    """The tensors of a reply, which are written by parts. Safe to share between threads.

    Args:
        places: Where parts go, for each tensor.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self._arrays: dict[int, tuple[np.ndarray, int]] = {}
        self._lock = threading.Lock()

    def form(self, items: np.ndarray) -> _PartForm:
        """Return the form of the reply for some of the items."""
        return _PartForm(self, items)

    def write(self, index: int, items: np.ndarray, array: np.ndarray, dtype: int) -> None:
        """Write a part's values of one tensor; its padding is zero."""
        place = self._places[index]
        with self._lock:
            if index not in self._arrays:
                self._arrays[index] = np.zeros(place.shape, array.dtype), dtype
        whole = self._arrays[index][0]
        whole[place.index(items, array.shape)] = array
        for padding in place.padding(items, array.shape):
            whole[padding] = 0

    def complete(self, builder: ReplyBuilder[Any]) -> None:
        """Write all tensors into the reply, once every part was written."""
        for index, (array, dtype) in self._arrays.items():
            builder.write(index, array, dtype)


class _PartForm:
    """The form of a part's reply; see ``ReplyForm``. Its bytes are counted with the whole reply."""

    shared_bytes = 0

    def __init__(self, assembly: Assembly, items: np.ndarray) -> None:
        self._assembly = assembly
        self._items = items

    def lay_out(self, tensors: Sequence[NamedTensor]) -> int:
        """See ``ReplyForm``."""
        return 0

    def builder(self, admit: Callable[[int], object]) -> _PartBuilder:
        """See ``ReplyForm``."""
        return _PartBuilder(self._assembly, self._items)

    def head(self, timings: Timings) -> bytes:
        """See ``ReplyForm``."""
        return b""

    def nbytes(self, payload: None) -> int:
        """See ``ReplyForm``."""
        return 0


class _PartBuilder:
    """Writes the values of a part; see ``ReplyBuilder``."""

    def __init__(self, assembly: Assembly, items: np.ndarray) -> None:
        self._assembly = assembly
        self._items = items

    def write(self, index: int, array: Any, dtype: int) -> None:
        """See ``ReplyBuilder``."""
        self._assembly.write(index, self._items, array, dtype)

    def finish(self, head: bytes) -> None:
        """See ``ReplyBuilder``."""
