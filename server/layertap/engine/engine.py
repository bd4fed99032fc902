"""The engine: models by name, and layers of them on request. Knows no transport."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from layertap.engine.batch import (
    ImagesInput,
    TensorInput,
    check_tensor,
    decode_images,
    preprocess_images,
)
from layertap.engine.beside import run_beside
from layertap.engine.call import Call
from layertap.engine.compute import ComputeThreads
from layertap.engine.host import ModelHost
from layertap.engine.leaving import let_go
from layertap.engine.limits import Limits
from layertap.engine.reply import ReplyCollector, ReplyWriter, ShapeChangedError
from layertap.engine.resolve import Resolved
from layertap.engine.versions import Version, Versions
from layertap.errors import ConfigError, LayertapError, ModelRunError
from layertap.extraction.plan import Plan
from layertap.extraction.plan_cache import PlanCache
from layertap.extraction.points import Sink as PointSink
from layertap.models import LoadedModel, ModelSpec, load_model
from layertap.selection import Extractor, LayerSelection
from layertap.wire.messages import Timings, encode_reply_head

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
    """

    model: str
    input: TensorInput | ImagesInput
    selections: tuple[LayerSelection, ...]
    extractor: Extractor = Extractor.AUTO


@dataclass(frozen=True, slots=True)
class Extraction:
    """What the caller gets.

    Attributes:
        message: A serialized ``layertap.v1.ExtractResponse``.
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
        self._versions: Versions[ModelHost] = Versions()
        self._leaving: list[threading.Thread] = []

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
        if spec.name in self._versions:
            raise ConfigError(f"two models are called {spec.name!r}; give one another name")
        call = Call(own=True)
        model = self._compute.run(lambda: load_model(spec, self._device), call)
        return self._publish(model, declared, call, require_finite=require_finite)

    def replace(
        self,
        spec: ModelSpec,
        declared: Sequence[LayerSelection] = (),
        *,
        require_finite: bool = False,
        call: Call | None = None,
    ) -> ModelHost:
        """Load a model as ``load`` does, while the version that has its name serves on.

        Weights are read beside the requests; what runs the model takes its turn among them. Once
        everything is warm, new requests go to the new version. The former one answers those that it
        has, and is let go in the background. Where the name is new, this is a load. Both versions
        are in memory for a while.

        Args:
            spec: What to load.
            declared: Layers that will be asked for.
            require_finite: Whether NaN and infinity in a layer are an error.
            call: Cancels the load; its ``own`` should be set.

        Raises:
            ModelLoadError: Where the model can't be had or can't run; the former version serves on,
                as after any other error.
            LayertapError: Whatever a request for the declared layers would raise.
            CancelledError: Where the call was cancelled.
        """
        call = call or Call(own=True)
        model = run_beside(lambda: load_model(spec, self._device), call)
        return self._publish(model, declared, call, require_finite=require_finite)

    def unload(self, name: str, *, wait: bool = True) -> None:
        """Let go of a model; requests that were admitted are still answered.

        Args:
            name: The model, or one that was expected and never came.
            wait: Whether to return only once it has been let go.

        Raises:
            ModelNotFoundError: Where no model has that name.
        """
        former = self._versions.withdraw(name)
        if former is not None and wait:
            let_go(former, self._compute)
        elif former is not None:
            self._let_go_beside(former)

    def expect(self, names: Sequence[str]) -> None:
        """Name the models that are to be served, in the order in which ``hosts`` lists them.

        A request for one that is not loaded yet is UNAVAILABLE instead of not found.
        """
        self._versions.expect(names)

    def explain(self, name: str, reason: str) -> None:
        """Say why a model is not served, for those who ask for it; nothing changes where it is."""
        self._versions.explain(name, reason)

    def hosts(self) -> list[ModelHost]:
        """Return the served models in the order of ``expect``, then in that of their loading."""
        return self._versions.hosts()

    def host(self, name: str) -> ModelHost:
        """Return a served model.

        Raises:
            ModelNotFoundError: Where there is none of that name; the message has the served names.
            UnavailableError: Where it is being loaded or could not be loaded.
        """
        return self._versions.host(name)

    def extract(self, request: ExtractionRequest, call: Call) -> Extraction:
        """Run one request: check, plan, compute, publish.

        Args:
            request: What is wanted.
            call: The caller's patience.

        Raises:
            LayertapError: See the tree; nothing is computed for a request that is refused.
        """
        # Note [A version is let go when nobody uses it]
        with self._versions.lease(request.model) as host:
            return self._extract(host, request, call)

    def _extract(self, host: ModelHost, request: ExtractionRequest, call: Call) -> Extraction:
        resolved = host.resolve(request.selections, request.extractor)
        x = self._batch(host, request.input, call)
        plan = host.plan(resolved, tuple(x.shape[1:]), call)
        sink = self._sink(plan, resolved, x)
        prepared_ns = time.perf_counter_ns()

        def job() -> tuple[Sink, int, int]:
            begun_ns = time.perf_counter_ns()
            done = self._run(host, plan, resolved, x, sink)
            return done, begun_ns, time.perf_counter_ns()

        done, begun_ns, ended_ns = self._compute.run(job, call)
        timings = Timings(
            prepare_ns=prepared_ns - call.started_ns,
            queue_ns=begun_ns - prepared_ns,
            compute_ns=ended_ns - begun_ns,
            total_ns=time.perf_counter_ns() - call.started_ns,
        )
        message = done.finish(encode_reply_head(plan.extractor, timings))
        return Extraction(message, plan.extractor, timings)

    def close(self) -> None:
        """Finish what was admitted, then let go of the models."""
        self._compute.close()
        for host in self._versions.hosts():
            self._versions.withdraw(host.model.name)
            host.close()
        for leaving in self._leaving:
            leaving.join()

    def _publish(
        self,
        model: LoadedModel,
        declared: Sequence[LayerSelection],
        call: Call,
        *,
        require_finite: bool,
    ) -> ModelHost:
        host = ModelHost(
            model,
            self._compute,
            self.limits,
            self._plan_cache,
            require_finite=require_finite,
            call=call,
        )
        try:
            host.declare(declared, call)
            call.check()
        except BaseException:
            host.close()
            raise
        former = self._versions.publish(model.name, host)
        if former is not None:
            self._let_go_beside(former)
        return host

    def _let_go_beside(self, former: Version[ModelHost]) -> None:
        leaving = threading.Thread(
            target=let_go, args=(former, self._compute), name="layertap-leaving", daemon=True
        )
        self._leaving = [thread for thread in self._leaving if thread.is_alive()]
        # Started first: only then is it alive.
        leaving.start()
        self._leaving.append(leaving)

    def _batch(self, host: ModelHost, given: TensorInput | ImagesInput, call: Call) -> torch.Tensor:
        if isinstance(given, TensorInput):
            return check_tensor(host.model, given.tensor, self.limits)
        images = decode_images(host.model, given.images, self.limits)
        return self._compute.run(lambda: preprocess_images(host.model, images), call)

    def _sink(self, plan: Plan, resolved: Resolved, x: torch.Tensor) -> Sink:
        kind = ReplyCollector if plan.dynamic else ReplyWriter
        return kind(resolved.outputs, plan.specs, x.shape, self.limits.reply_bytes)

    def _run(
        self, host: ModelHost, plan: Plan, resolved: Resolved, x: torch.Tensor, sink: Sink
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
                sink = self._sink(plan, resolved, x)
                capture(sink)
        except LayertapError:
            raise
        except Exception as error:
            _log.exception("model %s failed", host.model.name)
            raise ModelRunError(
                f"model {host.model.name!r} failed on this input ({type(error).__name__})"
            ) from error
        return sink


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
