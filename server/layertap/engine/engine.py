"""The engine: runs extractions on models by name. Independent of any transport."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial

import torch

from layertap.call import Call
from layertap.engine.admission import Admission, Reservation
from layertap.engine.compute import ComputeThreads
from layertap.engine.host import ModelHost
from layertap.engine.loader_thread import run_in_loader_thread
from layertap.engine.pipeline import Extraction, ExtractionRequest, Pipeline
from layertap.engine.reply_form import P
from layertap.engine.unloading import Unloading
from layertap.engine.versions import Versions
from layertap.errors import ConfigError, ModelNotFoundError, UnavailableError
from layertap.extraction.plan_cache import PlanCache
from layertap.malloc import sparing_memory
from layertap.models import LoadedModel, ModelSpec, load_model
from layertap.resources import available_cpus
from layertap.selection import LayerSelection
from layertap.settings import HostOptions, Limits

__all__ = ["Engine"]


class Engine:
    """Serves layers of several models.

    Args:
        limits: The limits of requests.
        device: The default device of models, such as ``"cpu"`` or ``"cuda"``.
        threads: Cores for one forward pass on that device; None leaves it to PyTorch.
        instances: Forward passes that may run at once on that device. Every other device has its
            own compute threads: the same number if it is of the same kind, else one.
        plan_cache: Stores the compiled plans of declared layers.
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
        self._instances = instances, threads
        # Read this before starting threads with one core each: PyTorch gives new threads the number
        # that any thread set last.
        self._cores = min(torch.get_num_threads(), available_cpus())
        self._compute: dict[torch.device, ComputeThreads] = {}
        self._image_threads: ComputeThreads | None = None
        self._lock = threading.Lock()
        self._admission = Admission(self.limits.pending, self.limits.pending_bytes)
        self._pipeline = Pipeline(self._admission, self.limits)
        self._versions: Versions[ModelHost] = Versions()
        self._unloading = Unloading()

    @property
    def pending(self) -> int:
        """Requests that wait for a compute thread or run on one."""
        return self._admission.requests

    @property
    def alive(self) -> bool:
        """Whether all compute threads run and their devices work, so that requests are answered."""
        with self._lock:
            return all(threads.alive for threads in self._compute.values())

    @property
    def pending_bytes(self) -> int:
        """Bytes of the requests and replies in memory."""
        return self._admission.bytes

    def load(
        self,
        spec: ModelSpec,
        declared: Sequence[LayerSelection] = (),
        *,
        options: HostOptions | None = None,
        device: str = "",
    ) -> ModelHost:
        """Load a model, measure its catalogue and warm the plans of its declared layers.

        Args:
            spec: The model to load.
            declared: Layers that will be requested.
            options: How to serve it; default options if not given.
            device: The device to run it on, such as ``"cuda:1"``; the engine's own if empty.

        Raises:
            ConfigError: If the name is taken.
            ModelLoadError: If the model can't be loaded or can't run.
            LayertapError: Any error that a request for the declared layers would raise.
        """
        if spec.name in self._versions:
            raise ConfigError(f"two models are called {spec.name!r}; give one another name")
        call, where = Call(), self._where(device)
        again = partial(load_model, spec, where)
        model = self._threads(where).run(again, call)
        return self._publish(model, declared, options, where=where, call=call, again=again)

    def replace(
        self,
        spec: ModelSpec,
        declared: Sequence[LayerSelection] = (),
        *,
        options: HostOptions | None = None,
        device: str = "",
        call: Call | None = None,
    ) -> ModelHost:
        """Load a model as ``load`` does, while the current version with its name keeps serving.

        Weights are read while requests run; steps that run the model alternate with requests. Once
        everything is warm, new requests go to the new version. The former version answers its
        remaining requests and is unloaded in the background. If the name is new, this is the same
        as ``load``. Both versions are in memory for some time.

        Args:
            spec: The model to load.
            declared: Layers that will be requested.
            options: How to serve it; default options if not given.
            device: The device to run it on, such as ``"cuda:1"``; the engine's own if empty.
            call: Cancels the load.

        Raises:
            ModelLoadError: If the model can't be loaded or can't run. The former version keeps
                serving after this or any other error.
            LayertapError: Any error that a request for the declared layers would raise.
            CancelledError: If the call was cancelled.
        """
        call = call or Call()
        where = self._where(device)
        again = partial(load_model, spec, where)
        model = run_in_loader_thread(again, call)
        return self._publish(model, declared, options, where=where, call=call, again=again)

    def unload(self, name: str, *, wait: bool = True) -> None:
        """Unload a model. Requests that were admitted are still answered.

        Args:
            name: The model. It may be an expected model that was never loaded.
            wait: Whether to return only after its memory was freed.

        Raises:
            ModelNotFoundError: If no model has that name.
        """
        former = self._versions.withdraw(name)
        if former is not None and wait:
            self._unloading.run(former)
        elif former is not None:
            self._unloading.start(former)

    def expect(self, names: Sequence[str]) -> None:
        """Register the models that will be served, in the order in which ``hosts`` lists them.

        A request for a model that is not loaded yet is then UNAVAILABLE instead of not found.
        """
        self._versions.expect(names)

    def explain(self, name: str, reason: str) -> None:
        """Set the reason that requests for an unloaded model get; no effect on a served model."""
        self._versions.explain(name, reason)

    def hosts(self) -> list[ModelHost]:
        """Return the served models in the order of ``expect``, then in the order of loading."""
        return self._versions.hosts()

    def states(self) -> list[tuple[str, str]]:
        """Return (name, reason) for each expected model; the reason is empty if it is served."""
        return self._versions.states()

    def host(self, name: str) -> ModelHost:
        """Return a served model.

        Raises:
            ModelNotFoundError: If there is no such model; the message lists the served models.
            UnavailableError: If it is being loaded or could not be loaded.
        """
        return self._versions.host(name)

    def lease(self, name: str) -> AbstractContextManager[ModelHost]:
        """Return a block in which one version of a model can be used; it stays until the end.

        A request takes one lease for everything that it does with the model, so that no answer
        mixes two versions; see Note [A version is unloaded when nobody uses it]. The block must be
        entered at once.

        Raises:
            ModelNotFoundError, UnavailableError: As ``host`` does.
        """
        return self._versions.lease(name)

    def reserve(self, nbytes: int) -> Reservation:
        """Count the bytes of a received request; the caller must release them.

        Raises:
            OverloadedError: If they would exceed ``pending_bytes`` of the limits.
        """
        return self._admission.reserve("the request takes", nbytes)

    def extract(
        self,
        request: ExtractionRequest[P],
        call: Call,
        host: ModelHost | None = None,
        received: Reservation | None = None,
    ) -> Extraction[P]:
        """Run one request: admit, check, plan, compute, publish.

        Args:
            request: The request.
            call: The deadline and cancellation state of the request.
            host: The version to run, on which the caller has a lease. If None, the version that
                serves the request's model now.
            received: The result of ``reserve`` for the request. Bytes that are decoded from the
                request are added to it. The caller must release it afterwards. If None, only the
                decoded bytes are counted.

        Returns:
            The reply. The caller must call its ``release`` once it is no longer needed; until then
            its bytes count as pending.

        Raises:
            LayertapError: See the tree of errors. A refused request computes nothing.
        """
        if host is None:
            with self.lease(request.model) as leased:
                return self.extract(request, call, leased, received)
        if received is None:
            with self.reserve(0) as decoded:
                return self.extract(request, call, host, decoded)
        with self._admission.request():
            return self._pipeline.extract(host, request, call, received)

    def close(self) -> None:
        """Finish the admitted requests, then unload the models."""
        if self._image_threads is not None:
            self._image_threads.close()
        self._pipeline.close()
        for threads in self._compute.values():
            threads.close()
        self._unloading.end_all(self._versions)

    def _where(self, device: str) -> torch.device:
        where = torch.device(device) if device else self._device
        # "cuda" is the first CUDA device, so it has the same threads as "cuda:0".
        return torch.device("cuda", where.index or 0) if where.type == "cuda" else where

    def _threads(self, device: torch.device) -> ComputeThreads:
        """Return the compute threads of a device; they are started when first needed."""
        with self._lock:
            if device not in self._compute:
                alike = device.type == self._device.type
                self._compute[device] = ComputeThreads(
                    *(self._instances if alike else (1, self._cores)), device=device
                )
            return self._compute[device]

    def _preparing(self, device: torch.device) -> ComputeThreads | None:
        """Return threads that prepare images alongside the passes of a GPU; None for a CPU.

        On a CPU the compute threads prepare them, because they use all its cores.
        """
        if device.type != "cuda":
            return None
        with self._lock:
            if self._image_threads is None:
                self._image_threads = ComputeThreads(available_cpus(), 1)
            return self._image_threads

    def _publish(
        self,
        model: LoadedModel,
        declared: Sequence[LayerSelection],
        options: HostOptions | None,
        *,
        where: torch.device,
        call: Call,
        again: Callable[[], LoadedModel],
    ) -> ModelHost:
        with sparing_memory(model.weight_bytes()):
            host = ModelHost(
                model,
                self._threads(where),
                self.limits,
                self._plan_cache,
                options=options,
                call=call,
                preparing=self._preparing(where),
                again=again,
            )
        with suppress(ModelNotFoundError, UnavailableError):
            host.sharing.inherit(self._versions.host(model.name).sharing)
        try:
            host.declare(declared, call)
            call.check()
        except BaseException:
            host.close()
            raise
        former = self._versions.publish(model.name, host)
        if former is not None:
            self._unloading.start(former)
        return host
