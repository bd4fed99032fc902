"""The engine: models by name, and layers of them on request. Knows no transport."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

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
from layertap.engine.reply import ReplyCollector, ReplyWriter, ShapeChangedError
from layertap.engine.resolve import Resolved
from layertap.errors import ConfigError, LayertapError, ModelNotFoundError, ModelRunError
from layertap.extraction.gate import no_forward_pass
from layertap.extraction.plan import Plan
from layertap.extraction.plan_cache import PlanCache
from layertap.extraction.points import Sink as PointSink
from layertap.models import ModelSpec, load_model
from layertap.selection import Extractor, LayerSelection
from layertap.wire.messages import REPLY_HEAD_SIZE, Timings, encode_reply_head

__all__ = ["Engine", "Extraction", "ExtractionRequest"]

_log = logging.getLogger(__name__)

Sink = ReplyWriter | ReplyCollector


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
    """

    message: bytes
    extractor: Extractor
    timings: Timings


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
        self._compute = ComputeThreads(self.limits.pending, instances, threads)
        self._hosts: dict[str, ModelHost] = {}

    @property
    def pending(self) -> int:
        """Requests and other jobs that wait for a compute thread or run on one."""
        return self._compute.pending

    def load(
        self,
        spec: ModelSpec,
        declared: Sequence[LayerSelection] = (),
        *,
        require_finite: bool = False,
    ) -> ModelHost:
        """Load a model, measure its catalogue and warm the plans of its declared layers.

        Args:
            spec: What to load.
            declared: Layers that will be asked for.
            require_finite: Whether NaN and infinity in a layer are an error.

        Raises:
            ConfigError: Where the name is taken.
            ModelLoadError: Where the model can't be had or can't run.
            LayertapError: Whatever a request for the declared layers would raise.
        """
        if spec.name in self._hosts:
            raise ConfigError(f"two models are called {spec.name!r}; give one another name")
        model = self._compute.run(lambda: load_model(spec, self._device), Call())
        host = ModelHost(
            model, self._compute, self.limits, self._plan_cache, require_finite=require_finite
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
        """Run one request: check, plan, compute, publish.

        Args:
            request: What is wanted.
            call: The caller's patience.

        Raises:
            LayertapError: See the tree; nothing is computed for a request that is refused.
        """
        host = self.host(request.model)
        resolved = host.resolve(request.selections, request.extractor)
        x = self._batch(host, request.input, call)
        plan = host.plan(resolved, tuple(x.shape[1:]), call)
        sink = self._sink(plan, resolved, x, request.reply_fields)
        prepared_ns = time.perf_counter_ns()

        def job() -> tuple[Sink, int, int]:
            begun_ns = time.perf_counter_ns()
            done = self._run(host, plan, resolved, x, sink, reply_fields=request.reply_fields)
            return done, begun_ns, time.perf_counter_ns()

        done, begun_ns, ended_ns = self._compute.run(job, call)
        timings = Timings(
            prepare_ns=prepared_ns - call.started_ns,
            queue_ns=begun_ns - prepared_ns,
            compute_ns=ended_ns - begun_ns,
            total_ns=time.perf_counter_ns() - call.started_ns,
        )
        head = encode_reply_head(plan.extractor, timings)
        message = done.finish(head + request.reply_fields)
        return Extraction(message, plan.extractor, timings)

    def close(self) -> None:
        """Finish what was admitted, then let go of the models."""
        self._compute.close()
        for host in self._hosts.values():
            host.close()
        self._hosts.clear()

    def _batch(self, host: ModelHost, given: TensorInput | ImagesInput, call: Call) -> torch.Tensor:
        if isinstance(given, TensorInput):
            return check_tensor(host.model, given.tensor, self.limits)
        images = decode_images(host.model, given.images, self.limits)
        return self._compute.run(lambda: preprocess_images(host.model, images), call)

    def _sink(self, plan: Plan, resolved: Resolved, x: torch.Tensor, fields: bytes) -> Sink:
        kind = ReplyCollector if plan.dynamic else ReplyWriter
        head_size = REPLY_HEAD_SIZE + len(fields)
        return kind(resolved.outputs, plan.specs, x.shape, self.limits.reply_bytes, head_size)

    def _run(
        self,
        host: ModelHost,
        plan: Plan,
        resolved: Resolved,
        x: torch.Tensor,
        sink: Sink,
        *,
        reply_fields: bytes,
    ) -> Sink:
        def batch() -> torch.Tensor:
            on_device = x.to(self._device, host.model.input.dtype)
            return on_device.clone() if host.catalogue.mutates_input else on_device

        def capture(sink: Sink) -> None:
            checked = _finite_only(sink, host, resolved) if host.require_finite else sink
            with host.turn:
                plan.built.run(batch(), checked)

        try:
            try:
                capture(sink)
            except ShapeChangedError:
                plan.dynamic = True
                sink = self._sink(plan, resolved, x, reply_fields)
                capture(sink)
        except LayertapError:
            raise
        except Exception as error:
            _log.exception("model %s failed", host.model.name)
            raise ModelRunError(
                f"model {host.model.name!r} failed on this input ({type(error).__name__})"
            ) from error
        return sink


def _close_alone(host: ModelHost) -> None:
    """Close a host once no forward pass needs its hooks any more."""
    with no_forward_pass():
        host.close()


def _finite_only(sink: Sink, host: ModelHost, resolved: Resolved) -> PointSink:
    """Wrap a sink so that it takes finite values only."""

    def take(index: int, value: torch.Tensor) -> None:
        finite = value.isfinite()
        if not finite.all():
            layer = host.catalogue.names[resolved.points[index]]
            raise ModelRunError(
                f"layer {layer!r} of model {host.model.name!r} holds NaN or infinity in "
                f"{value.numel() - int(finite.sum())} of {value.numel()} elements on this input"
            )
        sink(index, value)

    return take
