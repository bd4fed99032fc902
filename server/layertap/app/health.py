"""``grpc.health.v1`` with models that come and go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from layertap.app.places import Places
from layertap.services.feature_service import FeatureService
from layertap.services.infer.service import InferenceService

__all__ = ["WATCHES", "ModelHealth"]

WATCHES = 64
"""Calls of ``Watch`` that may be open at once; anybody may make them, and each keeps a thread."""

SPARE_THREADS = 16
"""For checks, and for those who watch in vain."""

NAME_CHARACTERS = 1024
"""Of a name that is watched, which is kept for as long."""

_SERVER = ("", FeatureService.NAME, InferenceService.NAME)

Status = health_pb2.HealthCheckResponse


class ModelHealth(health.HealthServicer):  # type: ignore[misc] # ships no types
    """Health by service name; each model has its own.

    After the server began to stop, nothing that is set is told any more.

    Note [A watcher that does not listen]
        gRPC's own ``Watch`` sends while it holds the lock of all statuses, and a message to a
        client that takes none (an HTTP/2 window of 0) waits until the client is gone: one such
        client, without a token, would hold up every check, every reload and the stop. It also keeps
        each name that was ever watched. Here each watcher has a thread, which waits for news and
        sends outside of the lock, and nothing is kept of it once it is gone.

    Note [Threads of health]
        A call that is begun and whose request never comes keeps a thread, before any handler is
        asked. Of health anybody may begin calls, so it has threads of its own: who has no token
        can't take those of extraction.
    """

    def __init__(self) -> None:
        super().__init__(experimental_non_blocking=False)
        self._news = threading.Condition(self._lock)
        self._places = Places(WATCHES, "watch health")

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return what a ``grpc.Server`` needs to serve this by threads of its own."""
        threads = ThreadPoolExecutor(WATCHES + SPARE_THREADS, thread_name_prefix="layertap-health")
        coding = (health_pb2.HealthCheckRequest.FromString, Status.SerializeToString)
        methods = {
            "Check": grpc.unary_unary_rpc_method_handler(_Threaded(self.Check, threads), *coding),
            "Watch": grpc.unary_stream_rpc_method_handler(_Threaded(self.Watch, threads), *coding),
        }
        return grpc.method_handlers_generic_handler(health.SERVICE_NAME, methods)

    def show_server(self, *, serving: bool) -> None:
        """Tell whether anything is served, for the server as a whole and for its services."""
        for name in _SERVER:
            self.show(name, serving=serving)

    def show(self, name: str, *, serving: bool) -> None:
        """Tell whether a model, a service or with ``""`` the server as a whole is served."""
        self.set(name, Status.SERVING if serving else Status.NOT_SERVING)

    def serving(self, name: str) -> bool:
        """Tell whether a model, a service or with ``""`` the server as a whole is served."""
        with self._lock:
            return bool(self._server_status.get(name) == Status.SERVING)

    def forget(self, name: str) -> None:
        """Let a model be unknown: watchers are told SERVICE_UNKNOWN, checks end NOT_FOUND."""
        self.set(name, Status.SERVICE_UNKNOWN)

    def set(self, service: str, status: int) -> None:
        """Set a status, and tell those who watch it."""
        with self._news:
            super().set(service, status)
            self._news.notify_all()

    def enter_graceful_shutdown(self) -> None:
        """Tell NOT_SERVING of everything from now on; who watches hears that and no more."""
        with self._news:
            super().enter_graceful_shutdown()
            self._news.notify_all()

    def Watch(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> Iterator[health_pb2.HealthCheckResponse]:
        """Tell a status and each that follows, until the caller is gone or the server stops."""
        if len(request.service) > NAME_CHARACTERS:
            text = f"service: got {len(request.service)} characters, at most {NAME_CHARACTERS}"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        with self._places.taken(context):
            context.add_callback(self._wake)
            told = None
            while (status := self._next(request.service, told, context)) is not None:
                yield Status(status=status)
                told = status

    def Check(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """Answer a check. SERVICE_UNKNOWN is for watchers alone, says the protocol."""
        reply: health_pb2.HealthCheckResponse = super().Check(request, context)
        if reply.status == Status.SERVICE_UNKNOWN:
            context.set_code(grpc.StatusCode.NOT_FOUND)
        return reply

    def _next(self, name: str, told: int | None, context: grpc.ServicerContext) -> int | None:
        """Wait for another status than the one that was told; None where there will be none."""
        with self._news:
            while context.is_active():
                status: int = self._server_status.get(name, Status.SERVICE_UNKNOWN)
                if status != told:
                    return status
                if self._gracefully_shutting_down:
                    return None
                self._news.wait()
        return None

    def _wake(self) -> None:
        with self._news:
            self._news.notify_all()


class _Threaded:
    """A behaviour that gRPC runs by other threads than the server's; it looks for the attribute."""

    def __init__(self, behaviour: Callable[..., Any], threads: ThreadPoolExecutor) -> None:
        self._behaviour = behaviour
        self.experimental_thread_pool = threads

    def __call__(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Do it."""
        return self._behaviour(request, context)
