"""One request's way: check, plan, compute, publish."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from layertap.engine.admission import Admission, Reservation
from layertap.engine.batch import (
    ImagesInput,
    TensorInput,
    batch_bytes,
    check_tensor,
    decode_images,
    preprocess_images,
)
from layertap.engine.call import Call
from layertap.engine.host import ModelHost
from layertap.engine.limits import Limits
from layertap.engine.reply import Envelope, Reply, ReplyCollector, ReplyWriter
from layertap.engine.work import Work, compute
from layertap.errors import DeadlineExceededError
from layertap.resources import available_cpus
from layertap.selection import Extractor, LayerSelection
from layertap.wire.messages import Timings
from layertap.wire.reply_form import NativeForm, ReplyForm

__all__ = ["Extraction", "ExtractionRequest", "Pipeline"]


@dataclass(frozen=True, slots=True)
class ExtractionRequest:
    """What a caller wants.

    Attributes:
        model: A served model's name.
        input: The batch.
        selections: The layers to return.
        extractor: How to take them.
        form: Makes the form of the reply for the extractor that was chosen; the native one unless
            told otherwise.
    """

    model: str
    input: TensorInput | ImagesInput
    selections: tuple[LayerSelection, ...]
    extractor: Extractor = Extractor.AUTO
    form: Callable[[Extractor], ReplyForm] = NativeForm


@dataclass(frozen=True, slots=True)
class Extraction:
    """What the caller gets.

    Attributes:
        message: The serialized reply: a ``layertap.v1.ExtractResponse``, or what the form makes.
        extractor: Which extractor served it; never AUTO.
        timings: Where the time went.
        together: Requests that shared the forward pass, this one included.
        shared_bytes: Bytes of tensors that stand in shared memory instead of in the message.
        items: Items of the request.
        reservation: The bytes of the message; to be released once it was sent or is not needed.
    """

    message: bytes
    extractor: Extractor
    timings: Timings
    together: int = 1
    shared_bytes: int = 0
    items: int = 1
    reservation: Reservation | None = field(default=None, compare=False, repr=False)

    def release(self) -> None:
        """Give back the bytes that were reserved for the message."""
        if self.reservation is not None:
            self.reservation.release()


class Pipeline:
    """Takes requests through their models' compute threads.

    Args:
        admission: Counts the bytes of replies.
        limits: What requests may ask for.
    """

    def __init__(self, admission: Admission, limits: Limits) -> None:
        self._admission = admission
        self._limits = limits
        self._decoders = threading.Semaphore(available_cpus())

    def extract(
        self, host: ModelHost, request: ExtractionRequest, call: Call, received: Reservation
    ) -> Extraction:
        """Run a request on a model; see ``Engine.extract``."""
        reply = self._admission.reserve("the reply would take")
        try:
            return self._extract(host, request, call, received, reply)
        except BaseException:
            reply.release()
            raise

    def _extract(
        self,
        host: ModelHost,
        request: ExtractionRequest,
        call: Call,
        received: Reservation,
        reserved: Reservation,
    ) -> Extraction:
        resolved = host.resolve(request.selections, request.extractor)
        x = self._batch(host, request.input, call, received)
        plan = host.plan(resolved, tuple(x.shape), call)
        form = request.form(plan.extractor)
        envelope = Envelope(self._limits.reply_bytes, form, reserved.take)
        parts = (resolved.outputs, plan.specs, x.shape, envelope, host.staging)

        def collect() -> Reply:
            # The reply before was given up, and its memory with it.
            reserved.shrink(0)
            return ReplyCollector(*parts)

        kind = ReplyCollector if plan.dynamic else ReplyWriter
        # Nothing here refers to the reply, so that its memory goes if ``collect`` replaces it.
        work = Work(host, plan, resolved, x, kind(*parts), collect, call)
        items = work.items
        prepared_ns = time.perf_counter_ns()
        done = host.compute.run_batched(
            work,
            compute,
            call,
            key=_key(work),
            size=items,
            policy=host.options.batching,
            pins=(received, reserved),
        )
        del work, x  # The input may be large, and was needed for the pass only.
        done.arrive()
        ended_ns = time.perf_counter_ns()
        timings = Timings(
            prepare_ns=prepared_ns - call.started_ns,
            queue_ns=done.begun_ns - prepared_ns,
            compute_ns=ended_ns - done.begun_ns,
            total_ns=time.perf_counter_ns() - call.started_ns,
        )
        message = done.reply.finish(timings)
        # What was copied to the host or cast on the way has gone; the message is left.
        reserved.shrink(len(message))
        return Extraction(
            message, plan.extractor, timings, done.together, form.shared_bytes, items, reserved
        )

    def _batch(
        self,
        host: ModelHost,
        given: TensorInput | ImagesInput,
        call: Call,
        received: Reservation,
    ) -> torch.Tensor:
        if isinstance(given, TensorInput):
            x = check_tensor(host.model, given.tensor, self._limits)
        else:
            x = self._images(host, given, call, received)
        if host.staging is None:
            return x
        received.take(x.nbytes)
        return host.staging.upload(x)

    def _images(
        self, host: ModelHost, given: ImagesInput, call: Call, received: Reservation
    ) -> torch.Tensor:
        # The files are copies of what the message holds.
        received.take(sum(map(len, given.images)))
        with self._admission.reserve("the request's decoded images take") as pixels:
            with self._decoding(call):
                images = decode_images(host.model, given.images, self._limits, pixels.take)
            received.take(batch_bytes(host.model, images))
            preprocess = partial(preprocess_images, host.model, images)
            return host.preparing.run(preprocess, call, pins=(received, pixels))

    @contextmanager
    def _decoding(self, call: Call) -> Iterator[None]:
        """Decode no more images at once than there are CPUs: more would only slow each other."""
        if not self._decoders.acquire(timeout=call.remaining()):
            raise DeadlineExceededError("the deadline passed before the images were decoded")
        try:
            yield
        finally:
            self._decoders.release()


def _key(work: Work) -> Hashable:
    """Return what requests that may share a forward pass have in common; None for those that can't.

    The plan stands for model, layers and extractor.
    """
    plan = work.plan
    if work.host.options.batching.max_size == 1 or plan.dynamic or plan.findings.alone:
        return None
    return id(plan), tuple(work.x.shape[1:]), work.x.dtype
