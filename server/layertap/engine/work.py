"""Runs requests on a compute thread: one at a time, or a batch of them in one pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic

import torch

from layertap.call import AbandonedError, Call, abandoning
from layertap.engine.host import ModelHost
from layertap.engine.lengths import Padding
from layertap.engine.reply import Reply, ShapeChangedError
from layertap.engine.reply_form import P
from layertap.engine.resolve import Resolved
from layertap.errors import LayertapError, ModelRunError, OverloadedError
from layertap.extraction.checkpoints import checked
from layertap.extraction.interventions import Changes
from layertap.extraction.operands import Operands
from layertap.extraction.out_of_memory import is_out_of_memory
from layertap.extraction.padding import cut
from layertap.extraction.plan import Plan
from layertap.extraction.points import Sink
from layertap.extraction.proof import items_of
from layertap.models import Batch

__all__ = ["Computed", "Work", "compute"]

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Work(Generic[P]):
    """One request, checked and planned.

    Attributes:
        host: The request's model.
        plan: The plan that captures its layers.
        resolved: Its resolved layers.
        x: Its input, on the CPU.
        reply: The reply for its outputs.
        collect: Makes a new reply if the values' shapes are not those that the plan predicts, and
            gives back what was reserved for the former reply.
        call: The deadline and cancellation state of the request.
        operands: The operands of its objective; None if it has none.
        padding: How it may share a pass with items of other lengths; None if it may not.
        changes: Its interventions; None if it has none.
    """

    host: ModelHost
    plan: Plan
    resolved: Resolved
    x: Batch
    reply: Reply[P]
    collect: Callable[[], Reply[P]]
    call: Call
    operands: Operands | None = None
    padding: Padding | None = None
    changes: Changes | None = None

    @property
    def items(self) -> int:
        """The number of items in its batch."""
        return self.x.size


@dataclass(frozen=True, slots=True)
class Computed(Generic[P]):
    """The result of a request.

    Attributes:
        reply: Its outputs, ready to be published.
        begun_ns: When its forward pass began, by ``time.perf_counter_ns``.
        together: The number of requests in the pass.
        model: The model's name.
        arrival: Completes once a GPU's values are on the host; None if they already are.
    """

    reply: Reply[P]
    begun_ns: int
    together: int
    model: str
    arrival: torch.cuda.Event | None = None

    def arrive(self) -> None:
        """Wait until all values are on the host. For the caller's thread; see Note [Staging].

        Raises:
            ModelRunError: If the device failed meanwhile.
        """
        if self.arrival is not None:
            with _model_errors(self.model):
                self.arrival.synchronize()


def compute(works: Sequence[Work[Any]]) -> list[Computed[Any]]:
    """Run requests with one key of ``run_batched`` in one forward pass. For a compute thread.

    Their payloads may have different types.

    Raises:
        ModelRunError: If the model fails.
        OverloadedError: If there is not enough memory to run it.
        CancelledError, DeadlineExceededError: If no caller waits any more; noticed between layers.
    """
    begun_ns = time.perf_counter_ns()
    host = works[0].host
    name = host.model.name
    try:
        with _model_errors(name):
            if len(works) == 1:
                _run_alone(works[0])
            else:
                _run_together(works)
            arrival = host.staging.launched() if host.staging else None
    except AbandonedError as abandoned:
        # Raise a new error, because the stored one refers to frames that refer to it.
        raise type(abandoned.reason)(str(abandoned.reason)) from None
    return [Computed(work.reply, begun_ns, len(works), name, arrival) for work in works]


@contextmanager
def _model_errors(name: str) -> Iterator[None]:
    """Convert errors of a model's code or its device to layertap's errors."""
    try:
        yield
    except LayertapError:
        raise
    except Exception as error:
        _log.exception("model %s failed", name)
        if is_out_of_memory(error):
            raise OverloadedError(f"out of memory while running model {name!r}") from error
        raise ModelRunError(
            f"model {name!r} failed on this input ({type(error).__name__})"
        ) from error


def _run_alone(work: Work[Any]) -> None:
    host = work.host
    x = host.on_device(work.x)
    try:
        _capture(work, x.clone() if host.catalogue.mutates_input else x)
    except ShapeChangedError:
        work.plan.findings.found_dynamic()
    else:
        return
    # Outside the handler, because the error refers to the former reply and its memory.
    work.reply = work.collect()
    _capture(work, x.clone() if host.catalogue.mutates_input else x)


def _capture(work: Work[Any], x: Batch) -> None:
    with _abandonable(work.host, [work.call]):
        work.plan.bound(work.operands, work.changes).run(x, _sink(work))


def _run_together(works: Sequence[Work[Any]]) -> None:
    """Run one pass, and give each request its items of every value."""
    # Shorter items are padded, so the plan is that of the longest ones.
    longest = max(works, key=_length)
    host, plan = longest.host, longest.plan
    x = Batch.cat([_padded(work, _length(longest)) for work in works])
    if longest.padding is None:
        if not host.shared_proof.prove(plan, x.size, x):
            raise _alone("items of its batches are not independent")
    elif x.size > longest.padding.items or _length(longest) > longest.padding.max_length:
        raise _alone("so many items of that length were not tested together")
    sinks = [_sink(work) for work in works]

    def share(index: int, value: torch.Tensor) -> None:
        spec = plan.specs[index]
        if tuple(value.shape) != spec.shape(x.size):
            raise ShapeChangedError
        begin = 0
        for work, sink in zip(works, sinks, strict=True):
            own = items_of(value, spec, begin, work.items)
            if work.padding is not None:
                own = cut(own, work.padding.axes[index], work.padding.length)
            sink(index, own)
            begin += work.items

    try:
        with _abandonable(host, [work.call for work in works]):
            plan.built.run(x, share)
    except ShapeChangedError:
        plan.findings.found_dynamic()
        raise _alone("a value's shape changed") from None


def _length(work: Work[Any]) -> int:
    return work.padding.length if work.padding is not None else 0


def _padded(work: Work[Any], length: int) -> Batch:
    x = work.host.on_device(work.x)
    return x if work.padding is None else work.padding.axis.padded(x, length)


def _alone(why: str) -> ModelRunError:
    """Return the error that makes the compute thread run each request alone; no caller gets it."""
    return ModelRunError(f"each request must run alone: {why}")


def _abandonable(host: ModelHost, calls: Sequence[Call]) -> AbstractContextManager[object]:
    """Return a block whose passes are abandoned once no call waits, if they may end early."""
    return checked(abandoning(calls)) if host.catalogue.scope.rules.early_stop else nullcontext()


def _sink(work: Work[Any]) -> Sink:
    return _finite_only(work) if work.host.options.require_finite else work.reply


def _finite_only(work: Work[Any]) -> Sink:
    """Wrap a request's sink to raise ModelRunError for values that are not finite."""

    def take(index: int, value: torch.Tensor) -> None:
        if work.plan.points[index].is_report:
            work.reply(index, value)
            return
        finite = value.isfinite()
        if not finite.all():
            layer = work.host.catalogue.name_of(work.plan.points[index])
            raise ModelRunError(
                f"layer {layer!r} of model {work.host.model.name!r} holds NaN or infinity in "
                f"{value.numel() - int(finite.sum())} of {value.numel()} elements on this input"
            )
        work.reply(index, value)

    return take
