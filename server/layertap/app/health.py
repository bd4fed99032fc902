"""``grpc.health.v1``, for models that are loaded and unloaded while the server runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
from google.protobuf.message import DecodeError as ProtobufDecodeError

from layertap.grpc_health import health_pb2
from layertap.services.bounded_calls import BoundedCalls
from layertap.services.feature_service import FeatureService
from layertap.services.grpc_adapter.handlers import aborting
from layertap.services.infer.service import InferenceService
from layertap.threads import WorkerThreads, run_in

__all__ = ["HEALTH", "WATCHES", "ModelHealth"]

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
"""The full name of the service."""

WATCHES = 64
"""Maximum number of open ``Watch`` calls; any client may open one, and each keeps a thread."""

CHECK_THREADS = 16
"""Threads that answer ``Check``."""

REFUSAL_THREADS = 16
"""Threads that refuse calls of ``Watch`` above the limit."""

NAME_CHARACTERS = 1024
"""Maximum length of a watched name, which is kept as long as it is watched."""

_SERVER = ("", FeatureService.NAME, InferenceService.NAME)

Status = health_pb2.HealthCheckResponse


class ModelHealth:
    """Reports health by service name; each model has its own status.

    Once the server has begun to stop, every status is NOT_SERVING, whatever is set later.

    Note [A watcher that does not listen]
        A message to a client that accepts none (an HTTP/2 window of 0) waits until the client
        disconnects. So each watcher has a thread that waits for changes and sends outside of the
        lock. Otherwise one such client, without a token, would block every check, every reload and
        the stop. All data of a watcher is removed when it disconnects, including the watched name.

    Note [Threads of health]
        A call whose request never arrives occupies a thread before any handler runs. Health needs
        no token, so it has its own thread pools: unauthenticated callers can't exhaust the threads
        that serve extraction. Check and Watch have one pool each, so that checks are answered
        however many clients watch.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._statuses: dict[str, Status.ServingStatus] = {}
        self._stopping = False
        self._open = BoundedCalls(WATCHES, "calls watch health")
        self.pools = (
            WorkerThreads(CHECK_THREADS, "layertap-health-check"),
            WorkerThreads(WATCHES + REFUSAL_THREADS, "layertap-health-watch"),
        )

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the handlers, which run on ``pools``; the caller must start these."""
        check, watch = self.pools
        encode = Status.SerializeToString
        methods = {
            "Check": grpc.unary_unary_rpc_method_handler(
                run_in(check, self.check), response_serializer=encode
            ),
            "Watch": grpc.unary_stream_rpc_method_handler(
                run_in(watch, self.watch), response_serializer=encode
            ),
        }
        return grpc.method_handlers_generic_handler(HEALTH, methods)

    def show_server(self, *, serving: bool) -> None:
        """Report whether the server as a whole and its services are serving."""
        for name in _SERVER:
            self.show(name, serving=serving)

    def show(self, name: str, *, serving: bool) -> None:
        """Report whether a model, a service or (``""``) the server as a whole is serving."""
        self._set(name, Status.SERVING if serving else Status.NOT_SERVING)

    def serving(self, name: str) -> bool:
        """Return whether a model, a service or (``""``) the server as a whole is serving."""
        return self.status(name) == Status.SERVING

    def status(self, name: str) -> Status.ServingStatus:
        """Return the status of a model, a service or the server; SERVICE_UNKNOWN for others."""
        with self._changed:
            return self._statuses.get(name, Status.SERVICE_UNKNOWN)

    def forget(self, name: str) -> None:
        """Report a model as unknown: watchers get SERVICE_UNKNOWN, checks end with NOT_FOUND."""
        with self._changed:
            if not self._stopping:
                self._statuses.pop(name, None)
                self._changed.notify_all()

    def enter_graceful_shutdown(self) -> None:
        """Report NOT_SERVING for everything from now on; notify watchers and end their calls."""
        with self._changed:
            self._stopping = True
            self._statuses = dict.fromkeys(self._statuses, Status.NOT_SERVING)
            self._changed.notify_all()

    def check(
        self, message: bytes, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """Return the current status; end with NOT_FOUND for an unknown name."""
        name = _name_in(message, context)
        status = self.status(name)
        if status == Status.SERVICE_UNKNOWN:
            text = f"service: got {name[:NAME_CHARACTERS]!r}, unknown to this server"
            context.abort(grpc.StatusCode.NOT_FOUND, text)
        return Status(status=status)

    def watch(
        self, message: bytes, context: grpc.ServicerContext
    ) -> Iterator[health_pb2.HealthCheckResponse]:
        """Yield the status and each change, until the caller disconnects or the server stops."""
        name = _name_in(message, context)
        if len(name) > NAME_CHARACTERS:
            text = f"service: got {len(name)} characters, expected at most {NAME_CHARACTERS}"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        with self._open.opened(aborting(context)):
            context.add_callback(self._wake)
            sent = None
            while (status := self._next(name, sent, context)) is not None:
                yield Status(status=status)
                sent = status

    def _set(self, name: str, status: Status.ServingStatus) -> None:
        with self._changed:
            self._statuses[name] = Status.NOT_SERVING if self._stopping else status
            self._changed.notify_all()

    def _next(
        self, name: str, sent: Status.ServingStatus | None, context: grpc.ServicerContext
    ) -> Status.ServingStatus | None:
        """Wait for a status other than the one last sent; None if there will be none."""
        with self._changed:
            while context.is_active():
                status = self._statuses.get(name, Status.SERVICE_UNKNOWN)
                if status != sent:
                    return status
                if self._stopping:
                    return None
                self._changed.wait()
        return None

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _name_in(message: bytes, context: grpc.ServicerContext) -> str:
    try:
        return health_pb2.HealthCheckRequest.FromString(message).service
    except ProtobufDecodeError:
        text = "request: got bytes that are not a valid HealthCheckRequest"
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        raise
