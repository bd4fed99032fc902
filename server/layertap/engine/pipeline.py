"""One request's way: check, plan, compute, publish."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from layertap.engine.admission import Admission
from layertap.engine.batch import (
    ImagesInput,
    TensorInput,
    check_tensor,
    decode_images,
    preprocess_images,
)
from layertap.engine.call import Call
from layertap.engine.host import ModelHost
from layertap.engine.limits import Limits
from layertap.engine.reply import Envelope, Reply, ReplyCollector, ReplyWriter
from layertap.engine.resolve import Resolved
from layertap.engine.staging import Staging
from layertap.engine.work import Work, compute
from layertap.errors import DeadlineExceededError, ExtractorUnsupportedError, ModelRunError
from layertap.extraction.plan import Plan
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
    """

    message: bytes
    extractor: Extractor
    timings: Timings
    together: int = 1
    shared_bytes: int = 0
    items: int = 1


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

    def extract(self, host: ModelHost, request: ExtractionRequest, call: Call) -> Extraction:
        """Run a request on a model; see ``Engine.extract``."""
        resolved = host.resolve(request.selections, request.extractor)
        x = self._batch(host, request.input, call)
        plan = host.plan(resolved, tuple(x.shape), call)
        if plan.extractor is Extractor.TORCHSCRIPT and not _is_finite(request, x):
            resolved = host.resolve(request.selections, _uncompiled(request, host))
            plan = host.plan(resolved, tuple(x.shape), call)
        try:
            return self._run(host, request, x, call, resolved=resolved, plan=plan)
        except ModelRunError as error:
            if plan.extractor is not Extractor.TORCHSCRIPT:
                raise
            return self._run_model(host, request, x, call, failed=plan, error=error)

    def _run_model(
        self,
        host: ModelHost,
        request: ExtractionRequest,
        x: torch.Tensor,
        call: Call,
        *,
        failed: Plan,
        error: ModelRunError,
    ) -> Extraction:
        """Run the model itself where its compiled program failed.

        If the model fails on this input too, its own error is raised. Else the program is at fault,
        and gives way to HOOK.
        """
        resolved = host.resolve(request.selections, Extractor.HOOK)
        plan = host.plan(resolved, tuple(x.shape), call)
        extraction = self._run(host, request, x, call, resolved=resolved, plan=plan)
        refusal = host.refuse(failed, str(error))
        if request.extractor is Extractor.AUTO:
            return extraction
        raise refusal

    def _run(
        self,
        host: ModelHost,
        request: ExtractionRequest,
        x: torch.Tensor,
        call: Call,
        *,
        resolved: Resolved,
        plan: Plan,
    ) -> Extraction:
        form = request.form(plan.extractor)
        envelope = Envelope(
            self._limits.reply_bytes, form, partial(self._admission.reserve, call=call)
        )
        make = partial(_reply, plan, resolved, x.shape, envelope, host.staging)
        work = Work(host, plan, resolved, x, make(), make, call)
        prepared_ns = time.perf_counter_ns()
        done = host.compute.run_batched(
            work, compute, call, key=_key(work), size=work.items, policy=host.options.batching
        )
        done.arrive()
        ended_ns = time.perf_counter_ns()
        timings = Timings(
            prepare_ns=prepared_ns - call.started_ns,
            queue_ns=done.begun_ns - prepared_ns,
            compute_ns=ended_ns - done.begun_ns,
            total_ns=time.perf_counter_ns() - call.started_ns,
        )
        message = done.reply.finish(timings)
        return Extraction(
            message, plan.extractor, timings, done.together, form.shared_bytes, work.items
        )

    def _batch(self, host: ModelHost, given: TensorInput | ImagesInput, call: Call) -> torch.Tensor:
        if isinstance(given, TensorInput):
            x = check_tensor(host.model, given.tensor, self._limits)
        else:
            with self._decoding(call):
                images = decode_images(host.model, given.images, self._limits)
            x = host.preparing.run(lambda: preprocess_images(host.model, images), call)
        return x if host.staging is None else host.staging.upload(x)

    @contextmanager
    def _decoding(self, call: Call) -> Iterator[None]:
        """Decode no more images at once than there are CPUs: more would only slow each other."""
        if not self._decoders.acquire(timeout=call.remaining()):
            raise DeadlineExceededError("the deadline passed before the images were decoded")
        try:
            yield
        finally:
            self._decoders.release()


def _is_finite(request: ExtractionRequest, x: torch.Tensor) -> bool:
    """Tell whether a request's input has neither NaN nor infinity; images never do."""
    if isinstance(request.input, ImagesInput) or not x.dtype.is_floating_point:
        return True
    # The sum is not finite if any element isn't, and takes a tenth of the time of asking each.
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def _uncompiled(request: ExtractionRequest, host: ModelHost) -> Extractor:
    """Return the extractor for input that compiled programs take otherwise than the model.

    Their fused kernels make zeros of NaN (``relu``), and spread it over other elements.
    """
    if request.extractor is Extractor.AUTO:
        return Extractor.HOOK
    raise ExtractorUnsupportedError(
        f"TORCHSCRIPT can't serve an input that holds NaN or infinity: compiled programs handle "
        f"them otherwise than model {host.model.name!r} does; HOOK can"
    )


def _reply(
    plan: Plan,
    resolved: Resolved,
    batch_shape: Sequence[int],
    envelope: Envelope,
    staging: Staging | None,
) -> Reply:
    kind = ReplyCollector if plan.dynamic else ReplyWriter
    return kind(resolved.outputs, plan.specs, batch_shape, envelope, staging)


def _key(work: Work) -> Hashable:
    """Return what requests that may share a forward pass have in common; None for those that can't.

    The plan stands for model, layers and extractor.
    """
    plan = work.plan
    if work.host.options.batching.max_size == 1 or plan.dynamic or plan.findings.alone:
        return None
    return id(plan), tuple(work.x.shape[1:]), work.x.dtype
