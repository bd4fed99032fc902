"""The engine: models by name, and layers of them on request. Knows no transport."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from layertap.batching import ALONE, BatchPolicy
from layertap.engine.admission import Admission
from layertap.engine.batch import (
    ImagesInput,
    TensorInput,
    check_tensor,
    decode_images,
    preprocess_images,
)
from layertap.engine.call import Call
from layertap.engine.compute import ComputeThreads
from layertap.engine.host import ModelHost
from layertap.engine.limits import Limits
from layertap.engine.reply import Envelope, Reply, ReplyCollector, ReplyWriter
from layertap.engine.resolve import Resolved
from layertap.engine.work import Work, compute
from layertap.errors import ConfigError, DeadlineExceededError, ModelNotFoundError
from layertap.extraction.gate import no_forward_pass
from layertap.extraction.plan import Plan
from layertap.extraction.plan_cache import PlanCache
from layertap.models import ModelSpec, load_model
from layertap.selection import Extractor, LayerSelection
from layertap.wire.messages import REPLY_HEAD_SIZE, Timings, encode_reply_head

__all__ = ["Engine", "Extraction", "ExtractionRequest"]


@dataclass(frozen=True, slots=True)
class ExtractionRequest:
    """What a caller wants.

    Attributes:
        model: A served model's name.
        input: The batch.
        selections: The layers to return.
        extractor: How to take them.
        reply_fields: Serialized fields that the reply bears besides its own, such as an item's id.
    """

    model: str
    input: TensorInput | ImagesInput
    selections: tuple[LayerSelection, ...]
    extractor: Extractor = Extractor.AUTO
    reply_fields: bytes = b""


@dataclass(frozen=True, slots=True)
class Extraction:
    """What the caller gets.

    Attributes:
        message: A serialized ``layertap.v1.ExtractResponse``, and ``reply_fields``.
        extractor: Which extractor served it; never AUTO.
        timings: Where the time went.
        together: Requests that shared the forward pass, this one included.
    """

    message: bytes
    extractor: Extractor
    timings: Timings
    together: int = 1


class Engine:
    """Serves layers of several models.

    Args:
        limits: What requests may ask for.
        device: Where models run, ``"cpu"`` or ``"cuda"``.
        threads: Cores that one forward pass computes with; None leaves it to PyTorch.
        instances: Forward passes that may run at once.
        plan_cache: Where the compiled plans of declared layers are stored.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        device: str = "cpu",
        threads: int | None = None,
        plan_cache: PlanCache | None = None,
        instances: int = 1,
    ) -> None:
        self.limits = limits or Limits()
        self._device = torch.device(device)
        self._plan_cache = plan_cache
        self._compute = ComputeThreads(instances, threads)
        self._admission = Admission(self.limits.pending, self.limits.pending_bytes)
        self._decoders = threading.Semaphore(len(os.sched_getaffinity(0)))
        self._hosts: dict[str, ModelHost] = {}

    @property
    def pending(self) -> int:
        """Requests that wait for a compute thread or run on one."""
        return self._admission.requests

    @property
    def pending_bytes(self) -> int:
        """Bytes of the replies that are being made or sent."""
        return self._admission.reply_bytes

    def load(
        self,
        spec: ModelSpec,
        declared: Sequence[LayerSelection] = (),
        *,
        require_finite: bool = False,
        batching: BatchPolicy = ALONE,
    ) -> ModelHost:
        """Load a model, measure its catalogue and warm the plans of its declared layers.

        Args:
            spec: What to load.
            declared: Layers that will be asked for.
            require_finite: Whether NaN and infinity in a layer are an error.
            batching: How large a batch of several requests may get, and how long it is waited for.

        Raises:
            ConfigError: Where the name is taken.
            ModelLoadError: Where the model can't be had or can't run.
            LayertapError: Whatever a request for the declared layers would raise.
        """
        if spec.name in self._hosts:
            raise ConfigError(f"two models are called {spec.name!r}; give one another name")
        model = self._compute.run(lambda: load_model(spec, self._device), Call())
        host = ModelHost(
            model,
            self._compute,
            self.limits,
            self._plan_cache,
            require_finite=require_finite,
            batching=batching,
        )
        try:
            host.declare(declared)
        except BaseException:
            host.close()
            raise
        self._hosts[spec.name] = host
        return host

    def unload(self, name: str) -> None:
        """Let go of a model; requests that were admitted are still answered.

        Raises:
            ModelNotFoundError: Where no model has that name.
        """
        host = self.host(name)
        self._hosts.pop(name, None)
        # Behind the requests that wait already.
        self._compute.run(partial(_close_alone, host), Call())
        # Modules, hooks and plans refer to each other in circles, and are too large to leave them
        # until the collector comes by on its own.
        del host
        gc.collect()

    def hosts(self) -> list[ModelHost]:
        """Return the served models in the order in which they were loaded."""
        return list(self._hosts.values())

    def host(self, name: str) -> ModelHost:
        """Return a served model; raise ModelNotFoundError with the served names for another."""
        host = self._hosts.get(name)
        if host is None:
            served = ", ".join(map(repr, tuple(self._hosts))) or "none"
            raise ModelNotFoundError(f"model: got {name!r}, served models: {served}")
        return host

    def extract(self, request: ExtractionRequest, call: Call) -> Extraction:
        """Run one request: admit, check, plan, compute, publish.

        Args:
            request: What is wanted.
            call: The caller's patience. The reply's bytes count as pending for as long as anything
                refers to it.

        Raises:
            LayertapError: See the tree; nothing is computed for a request that is refused.
        """
        with self._admission.request():
            return self._extract(request, call)

    def _extract(self, request: ExtractionRequest, call: Call) -> Extraction:
        host = self.host(request.model)
        resolved = host.resolve(request.selections, request.extractor)
        x = self._batch(host, request.input, call)
        plan = host.plan(resolved, tuple(x.shape[1:]), call)
        envelope = Envelope(
            self.limits.reply_bytes,
            REPLY_HEAD_SIZE + len(request.reply_fields),
            partial(self._admission.reserve, call=call),
        )
        make = partial(_reply, plan, resolved, x.shape, envelope)
        work = Work(host, plan, resolved, x, make(), make, call)
        prepared_ns = time.perf_counter_ns()
        done = self._compute.run_batched(
            work, compute, call, key=_key(work), size=work.items, policy=host.batching
        )
        timings = Timings(
            prepare_ns=prepared_ns - call.started_ns,
            queue_ns=done.begun_ns - prepared_ns,
            compute_ns=done.ended_ns - done.begun_ns,
            total_ns=time.perf_counter_ns() - call.started_ns,
        )
        head = encode_reply_head(plan.extractor, timings)
        message = done.reply.finish(head + request.reply_fields)
        return Extraction(message, plan.extractor, timings, done.together)

    def close(self) -> None:
        """Finish what was admitted, then let go of the models."""
        self._compute.close()
        for host in self._hosts.values():
            host.close()
        self._hosts.clear()

    def _batch(self, host: ModelHost, given: TensorInput | ImagesInput, call: Call) -> torch.Tensor:
        if isinstance(given, TensorInput):
            return check_tensor(host.model, given.tensor, self.limits)
        with self._decoding(call):
            images = decode_images(host.model, given.images, self.limits)
        return self._compute.run(lambda: preprocess_images(host.model, images), call)

    @contextmanager
    def _decoding(self, call: Call) -> Iterator[None]:
        """Decode no more images at once than there are cores: more would only slow each other."""
        if not self._decoders.acquire(timeout=call.remaining()):
            raise DeadlineExceededError("the deadline passed before the images were decoded")
        try:
            yield
        finally:
            self._decoders.release()


def _reply(plan: Plan, resolved: Resolved, batch_shape: Sequence[int], envelope: Envelope) -> Reply:
    kind = ReplyCollector if plan.dynamic else ReplyWriter
    return kind(resolved.outputs, plan.specs, batch_shape, envelope)


def _key(work: Work) -> Hashable:
    """Return what requests that may share a forward pass have in common; None for those that can't.

    The plan stands for model, layers and extractor.
    """
    if work.host.batching.max_size == 1 or work.plan.dynamic or work.plan.shared is False:
        return None
    return id(work.plan), tuple(work.x.shape[1:]), work.x.dtype


def _close_alone(host: ModelHost) -> None:
    """Close a host once no forward pass needs its hooks any more."""
    with no_forward_pass():
        host.close()
