"""The steps of one request: check, plan, compute, publish."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic

import torch

from layertap.call import Call
from layertap.engine.admission import Admission, Reservation
from layertap.engine.audio_batch import audio_tensors, decode_recordings
from layertap.engine.batch import (
    AudioFiles,
    ImageFiles,
    Inputs,
    batch_bytes,
    check_image_count,
    check_tensors,
    image_batch,
    parts_of,
    preprocess_images,
)
from layertap.engine.compute import Part
from layertap.engine.decoders import Decoders
from layertap.engine.divided import Division, Planned, divide
from layertap.engine.host import ModelHost
from layertap.engine.reply import Reply, ReplyWriter
from layertap.engine.reply_form import P, ReplyForm
from layertap.engine.reply_layout import (
    Beside,
    Envelope,
    reply_collector,
    reply_writer,
)
from layertap.engine.resolve import Resolved
from layertap.engine.sent_arrays import SentArrays, apart, has_arrays
from layertap.engine.text_batch import (
    TextBatch,
    beside_batch,
    check_texts,
    tensors_of_texts,
    tokenize,
)
from layertap.engine.work import Work, compute
from layertap.errors import ExtractorUnsupportedError, ModelRunError
from layertap.extraction.interventions import Changes
from layertap.extraction.kinds.base import ExtractorKind
from layertap.extraction.kinds.registry import REFERENCE
from layertap.extraction.operands import Operands
from layertap.extraction.plan import Plan
from layertap.extraction.projecting import Matrix
from layertap.intervention import Intervention
from layertap.models import Batch
from layertap.models.text import TokenizedTexts
from layertap.objective import Objective
from layertap.resources import available_cpus
from layertap.selection import Extractor, LayerSelection, MapForm
from layertap.settings import BatchPolicy, Limits
from layertap.timings import Timings

__all__ = ["Extraction", "ExtractionRequest", "Pipeline", "publish"]


@dataclass(frozen=True, slots=True)
class ExtractionRequest(Generic[P]):
    """What a caller requests.

    Attributes:
        model: The name of a served model.
        inputs: The batch: tensors and images by the names of the model's inputs.
        selections: The layers to return.
        extractor: The extractor to use.
        objective: What requested gradients are the gradients of; None if there are none.
        interventions: Changes of values while the model runs.
        variant: How the extractor's program is finished; empty for the usual way.
        form: Returns the form of the reply, given the chosen extractor and its variant.
    """

    model: str
    inputs: Inputs
    selections: tuple[LayerSelection, ...]
    extractor: Extractor = Extractor.AUTO
    objective: Objective | None = None
    interventions: tuple[Intervention, ...] = ()
    variant: str = field(default="", kw_only=True)
    form: Callable[[Extractor, str], ReplyForm[P]] = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class Extraction(Generic[P]):
    """The reply to one request.

    Attributes:
        payload: The reply in the request's form: the bytes of a message, or tensors.
        extractor: The extractor that served it; never AUTO.
        variant: How its program is finished; empty for the usual way.
        timings: How long each part took.
        together: The number of requests that shared the forward pass, including this one.
        shared_bytes: Bytes of tensors in shared memory instead of in the payload.
        items: The number of items in the request.
        reservation: The bytes of the payload. Release it once the payload was sent or dropped.
    """

    payload: P
    extractor: Extractor
    variant: str
    timings: Timings
    together: int = 1
    shared_bytes: int = 0
    items: int = 1
    reservation: Reservation | None = field(default=None, compare=False, repr=False)

    def release(self) -> None:
        """Give back the bytes that were reserved for the payload."""
        if self.reservation is not None:
            self.reservation.release()


@dataclass(frozen=True, slots=True)
class _Admitted(Generic[P]):
    """One request in the pipeline, with its reservations.

    Its selections have no arrays, which ``arrays`` has: selections are kept with plans.
    """

    host: ModelHost
    request: ExtractionRequest[P]
    call: Call
    received: Reservation
    reply: Reservation
    arrays: SentArrays = field(default_factory=SentArrays)


class Pipeline:
    """Runs requests on their models' compute threads.

    Args:
        admission: Counts the bytes of replies.
        limits: The limits of requests.
    """

    def __init__(self, admission: Admission, limits: Limits) -> None:
        self._admission = admission
        self._limits = limits
        self._decoders = Decoders(available_cpus())

    def close(self) -> None:
        """End the threads that help to decode."""
        self._decoders.close()

    def extract(
        self, host: ModelHost, request: ExtractionRequest[P], call: Call, received: Reservation
    ) -> Extraction[P]:
        """Run a request on a model; see ``Engine.extract``."""
        reply = self._admission.reserve("the reply would take")
        arrays = SentArrays()
        if any(map(has_arrays, request.selections)):
            selections, arrays = apart(request.selections)
            request = replace(request, selections=selections)
        try:
            return self._extract(_Admitted(host, request, call, received, reply, arrays))
        except BaseException:
            reply.release()
            raise

    def _extract(self, admitted: _Admitted[P]) -> Extraction[P]:
        host, request, call = admitted.host, admitted.request, admitted.call
        keys = request.objective.keys if request.objective else ()
        sites = tuple(each.key for each in request.interventions)
        resolved = host.resolve(request.selections, request.extractor, keys, sites, request.variant)
        x, beside = self._batch(admitted)
        padded = self._padded(admitted, x, beside, resolved)
        if padded is not None:
            return padded
        kind = host.outcomes.finite_only(resolved, x)
        if kind and not _is_finite(request, x):
            # Before a plan for the outcome of such numbers would be asked for.
            resolved = host.resolve(request.selections, _for_any_number(request, kind, host))
        plan = host.plan(resolved, x, call)
        if plan.kind.finite_only and not _is_finite(request, x):
            resolved = host.resolve(request.selections, _for_any_number(request, plan.kind, host))
            plan = host.plan(resolved, x, call)
        operands = self._operands(admitted, plan, x.size)
        changes = self._changes(admitted, plan, x.size)
        try:
            return self._run(admitted, Planned(x, beside, resolved, plan), operands, changes)
        except ModelRunError as error:
            if not plan.kind.compiled:
                raise
            reason = str(error)
        # Outside the handler, because the error refers to the former reply and its memory.
        admitted.reply.shrink(0)
        return self._run_model(admitted, x, beside, plan, reason)

    def _padded(
        self, admitted: _Admitted[P], x: Batch, beside: Beside, resolved: Resolved
    ) -> Extraction[P] | None:
        """Run a request in passes with items of other lengths; None if it can't be run so.

        See ``layertap.engine.lengths``.
        """
        host, request, call = admitted.host, admitted.request, admitted.call
        asked = request.extractor in (Extractor.AUTO, REFERENCE.id)
        if host.lengths is None or not asked or REFERENCE.id not in resolved.candidates:
            return None
        if request.objective is not None or request.interventions:
            return None  # These are about the values of all its items.
        padding = host.lengths.padding(resolved.pass_spec, x, call)
        if padding is None:
            return None
        resolved = host.resolve(request.selections, REFERENCE.id)
        plan = host.plan(resolved, x, call)
        if plan.dynamic:
            return None
        planned = Planned(x, beside, resolved, plan, padding)
        # Only texts are divided: the padding of tensors is the caller's, and so are its values.
        division = divide(host, planned) if request.inputs.texts else None
        divided = division and self._run_divided(admitted, planned, division)
        return divided or self._run(admitted, planned)

    def _run_divided(
        self, admitted: _Admitted[P], planned: Planned, division: Division
    ) -> Extraction[P] | None:
        """Run a request in several passes; None if one of them fails."""
        host, call, reserved = admitted.host, admitted.call, admitted.reply
        form = admitted.request.form(planned.plan.extractor, planned.plan.variant)
        envelope = Envelope(self._limits.reply_bytes, form, reserved.take)
        outputs, plan, size = planned.resolved.outputs, planned.plan, planned.x.size
        builder = reply_writer(outputs, plan, size, envelope, beside=planned.beside).builder
        reserved.take(division.nbytes)
        parts = division.parts(host, planned, call)
        prepared_ns = time.perf_counter_ns()
        try:
            done = host.compute.run_each(
                parts,
                compute,
                call,
                key=planned.padding and planned.padding.key,
                policy=host.sharing.policy(plan, padded=True),
                pins=(admitted.received, reserved),
            )
            for each in done:
                each.arrive()
                each.reply.complete()
        except ModelRunError:
            reserved.shrink(0)
            return None  # The error to report is the model's own for the whole batch.
        division.assembly.complete(builder)
        begun_ns, ended_ns = min(each.begun_ns for each in done), time.perf_counter_ns()
        timings = Timings(
            prepare_ns=prepared_ns - call.started_ns,
            queue_ns=begun_ns - prepared_ns,
            compute_ns=ended_ns - begun_ns,
            total_ns=ended_ns - call.started_ns,
        )
        payload = builder.finish(form.head(timings))
        reserved.shrink(form.nbytes(payload))
        together = max(each.together for each in done)
        return Extraction(
            payload, plan.extractor, plan.variant, timings,
            together, form.shared_bytes, size, reserved,
        )  # fmt: skip

    def _run_model(
        self, admitted: _Admitted[P], x: Batch, beside: Beside, failed: Plan, reason: str
    ) -> Extraction[P]:
        """Run the model itself after a compiled program failed.

        If the model fails on this input too, its own error is raised. Otherwise the program is at
        fault, and its plan is no longer used.
        """
        host, request = admitted.host, admitted.request
        resolved = host.resolve(request.selections, REFERENCE.id)
        plan = host.plan(resolved, x, admitted.call)
        extraction = self._run(admitted, Planned(x, beside, resolved, plan))
        refusal = host.refuse(failed, reason)
        if request.extractor is Extractor.AUTO:
            return extraction
        raise refusal

    def _operands(self, admitted: _Admitted[P], plan: Plan, size: int) -> Operands | None:
        """Return the operands of a request's objective, which fit its batch; None without one."""
        objective, facts = admitted.request.objective, plan.gradients
        if objective is None or facts is None:
            return None
        operands = Operands(objective.terms, tuple(admitted.arrays.baselines))
        facts.extractor.check(operands, size, shapes=not facts.dynamic)
        admitted.host.shared_proof.find_independence(plan, size, admitted.call)
        return operands

    def _changes(self, admitted: _Admitted[P], plan: Plan, size: int) -> Changes | None:
        """Return the interventions of a request, which fit its batch; None without any."""
        if plan.edits is None:
            return None
        changes = Changes(admitted.request.interventions, plan.edits.sites)
        changes.check(size)
        admitted.host.shared_proof.find_independence(plan, size, admitted.call)
        return changes

    def _run(
        self,
        admitted: _Admitted[P],
        planned: Planned,
        operands: Operands | None = None,
        changes: Changes | None = None,
    ) -> Extraction[P]:
        x, beside, resolved, plan, padding = planned
        host, call, reserved = admitted.host, admitted.call, admitted.reply
        form = admitted.request.form(plan.extractor, plan.variant)
        envelope = Envelope(self._limits.reply_bytes, form, reserved.take)
        sets = plan.pass_spec.sets
        rows = x.size * sets
        if sets > 1:
            beside = beside.repeated(sets)
        parts = (resolved.outputs, plan, rows, envelope, host.staging)

        def collect() -> Reply[P]:
            # The former reply was dropped, and its memory with it.
            reserved.shrink(0)
            return reply_collector(*parts, beside=beside)

        lay_out = reply_collector if plan.dynamic else reply_writer
        # No variable here refers to the reply, so its memory is freed if ``collect`` replaces it.
        reply = lay_out(*parts, beside=beside)
        work = Work(host, plan, resolved, x, reply, collect, call, operands, padding, changes)
        del reply
        if plan.gradients is not None:
            reserved.take(plan.gradients.bytes_for(x.size))
        if plan.edits is not None:
            reserved.take(plan.edits.bytes_for(x.size))
        items = x.size
        part = Part(work, items, padding.length if padding is not None else 0)
        policy = host.sharing.policy(plan, padded=padding is not None)
        prepared_ns = time.perf_counter_ns()
        with host.sharing.request(plan):
            (done,) = host.compute.run_each(
                [part],
                compute,
                call,
                key=_key(work, policy),
                policy=policy,
                pins=(admitted.received, reserved),
            )
        if done.arrival is not None:
            done.arrive()
        ended_ns = time.perf_counter_ns()
        timings = Timings(
            prepare_ns=prepared_ns - call.started_ns,
            queue_ns=done.begun_ns - prepared_ns,
            compute_ns=ended_ns - done.begun_ns,
            total_ns=time.perf_counter_ns() - call.started_ns,
        )
        payload = publish(done.reply, form, timings)
        # Copies on the host and casts have been freed by now; only the payload is left.
        reserved.shrink(form.nbytes(payload))
        return Extraction(
            payload, plan.extractor, plan.variant, timings,
            done.together, form.shared_bytes, items, reserved,
        )  # fmt: skip

    def _batch(self, admitted: _Admitted[Any]) -> tuple[Batch, Beside]:
        host, given = admitted.host, admitted.request.inputs
        parts = parts_of(host.model, given, self._limits)
        check_texts(parts.texts, self._limits)
        tokenized = {name: self._texts(admitted, batch) for name, batch in parts.texts.items()}
        made = tensors_of_texts(host.model, given, tokenized)
        for name, files in parts.images.items():
            made[name] = self._images(admitted, name, files)
        for name, recordings in parts.audio.items():
            made.update(self._audio(admitted, name, recordings))
        x = check_tensors(host.model, given.tensors, self._limits, made)
        beside = beside_batch(host.model, x, parts.texts, tokenized)
        if any(each.map_form is MapForm.OVERLAY for each in admitted.request.selections):
            beside = replace(beside, pictures=self._pictures(admitted, x))
        if admitted.arrays.projections:
            beside = replace(beside, matrices=self._matrices(admitted))
        if host.staging is None:
            return x, beside
        admitted.received.take(x.nbytes)
        return x.map(host.staging.upload), beside

    def _pictures(self, admitted: _Admitted[Any], x: Batch) -> torch.Tensor | None:
        """Return the pixels of a batch of images; None if they are not known."""
        model = admitted.host.model
        name = model.signature.main.name
        if model.preprocess is None or name not in model.image_inputs or name not in x:
            return None
        admitted.received.take(x[name].nbytes)
        return model.preprocess.pictures(x[name])

    def _matrices(self, admitted: _Admitted[Any]) -> tuple[Matrix, ...]:
        """Return the numbers of a request's projections, which are counted as received bytes."""
        given = admitted.arrays.projections
        admitted.received.take(sum(map(Matrix.nbytes, given)))
        return tuple(map(Matrix.of, given))

    def _texts(self, admitted: _Admitted[Any], given: TextBatch) -> TokenizedTexts:
        with self._decoders.permit(admitted.call):
            tokenized = tokenize(admitted.host.model, given, self._limits, admitted.call)
        admitted.received.take(sum(array.nbytes for array in tokenized))
        return tokenized

    def _images(self, admitted: _Admitted[Any], name: str, given: ImageFiles) -> torch.Tensor:
        host, call, received = admitted.host, admitted.call, admitted.received
        # The files are copies of parts of the message.
        received.take(sum(map(len, given.images)))
        with self._admission.reserve("the request's decoded images take") as pixels:
            check_image_count(host.model, len(given.images), self._limits)
            received.take(batch_bytes(host.model, name, len(given.images)))
            batch, decode = image_batch(host.model, given.images, self._limits, pixels.take)
            self._decoders.each(decode, len(given.images), call)
            if not batch.needs_torch:
                return preprocess_images(host.model, name, batch)
            preprocess = partial(preprocess_images, host.model, name, batch)
            return host.preparing.run(preprocess, call, pins=(received, pixels))

    def _audio(
        self, admitted: _Admitted[Any], name: str, given: AudioFiles
    ) -> dict[str, torch.Tensor]:
        host, call, received = admitted.host, admitted.call, admitted.received
        inputs = admitted.request.inputs
        # The files are copies of parts of the message.
        received.take(sum(map(len, given.files)))
        with self._admission.reserve("the request's decoded recordings take") as samples:
            with self._decoders.permit(call):
                waveforms = decode_recordings(host.model, given, self._limits, call, samples.take)
            convert = partial(audio_tensors, host.model, name, inputs, waveforms)
            made = host.preparing.run(convert, call, pins=(received, samples))
        received.take(sum(tensor.nbytes for tensor in made.values()))
        return made


def publish(reply: Reply[P], form: ReplyForm[P], timings: Timings) -> P:
    """Return the payload of a reply for which all values were captured."""
    if isinstance(reply, ReplyWriter) and reply.staging is None:
        builder = reply.builder  # Already complete: each value was written at its capture.
    else:
        builder = reply.complete()
    return builder.finish(form.head(timings))


def _is_finite(request: ExtractionRequest[Any], x: Batch) -> bool:
    """Return whether a request's inputs have no NaN or infinity."""
    return not request.inputs.may_be_infinite or x.is_finite


def _for_any_number(
    request: ExtractionRequest[Any], kind: ExtractorKind, host: ModelHost
) -> Extractor:
    """Return the extractor for input with NaN or infinity, which the kind can't take."""
    if request.extractor is Extractor.AUTO:
        return REFERENCE.id
    raise ExtractorUnsupportedError(
        f"{kind.name} can't serve an input that holds NaN or infinity: compiled programs "
        f"handle them differently from model {host.model.name!r} does; {REFERENCE.name} can"
    )


def _key(work: Work[Any], policy: BatchPolicy) -> Hashable:
    """Return a key that is equal for requests that may share a pass; None for all others.

    A plan is identified by its model, extractor, pass spec and batch key.
    """
    plan = work.plan
    if work.padding is not None:
        return work.padding.key
    if policy.max_size == 1 or plan.dynamic or plan.findings.alone:
        return None
    if work.operands is not None or work.changes is not None:
        return None  # Operands and interventions are those of one request.
    return id(plan), work.x.key
