"""A gRPC server around an engine: health, reflection, limits, drain."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_reflection.v1alpha import reflection

from layertap.app.channel import channel_options
from layertap.app.health import ModelHealth
from layertap.engine import Engine
from layertap.errors import UnavailableError
from layertap.services.admin_service import AdminService
from layertap.services.feature_service import FeatureService
from layertap.services.observer import Observer

__all__ = ["FeatureServer", "ServerOptions"]

PORT = 8001
"""Where inference servers listen for gRPC by convention; metrics are at 8002."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How to listen.

    Attributes:
        host: The address to bind; only this machine unless told otherwise.
        port: The port; 0 for a free one.
        workers: Threads that parse requests and wait for a compute thread. They hardly ever
            compute, so there may be many more of them than cores.
    """

    host: str = "127.0.0.1"
    port: int = PORT
    workers: int = 32


class FeatureServer:
    """Serves an engine. Models may be loaded into it before or after ``start``.

    Health (``grpc.health.v1``) answers for the server (``""``), the service's full name and each
    model's name: NOT_SERVING until ``ready``, and from the begin of ``stop``. Whoever loads models
    later tells their health by ``health``.

    Args:
        engine: The engine; it stays the caller's to close.
        options: How to listen.
        observer: Is told how each extraction ended.
        health: What to tell of models; one of its own if not given.
        admin: What the owner may ask for; nothing if not given.

    Raises:
        UnavailableError: Where the address can't be bound.
    """

    def __init__(
        self,
        engine: Engine,
        options: ServerOptions | None = None,
        observer: Observer | None = None,
        health: ModelHealth | None = None,
        admin: AdminService | None = None,
    ) -> None:
        self._engine = engine
        options = options or ServerOptions()
        self._server = grpc.server(
            ThreadPoolExecutor(options.workers, thread_name_prefix="layertap-rpc"),
            options=channel_options(engine.limits.request_bytes),
        )
        self._health = health or ModelHealth()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_generic_rpc_handlers((FeatureService(engine, observer).handlers(),))
        names = [FeatureService.NAME, HEALTH, reflection.SERVICE_NAME]
        if admin is not None:
            self._server.add_generic_rpc_handlers((admin.handlers(),))
            names.append(AdminService.NAME)
        reflection.enable_server_reflection(names, self._server)
        self._set_health(serving=False)
        self.address = self._bind(options)

    def start(self) -> None:
        """Begin to answer; health stays NOT_SERVING until ``ready``."""
        self._server.start()

    def ready(self) -> None:
        """Report the server, its service and its models as SERVING."""
        self._set_health(serving=True)

    def stop(self, grace: float) -> None:
        """Report NOT_SERVING, refuse new calls, give admitted ones ``grace`` seconds to finish."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()

    def wait(self) -> None:
        """Block until the server has stopped."""
        self._server.wait_for_termination()

    def _set_health(self, *, serving: bool) -> None:
        models = (host.model.name for host in self._engine.hosts())
        for name in ("", FeatureService.NAME, *models):
            self._health.show(name, serving=serving)

    def _bind(self, options: ServerOptions) -> str:
        wanted = f"{options.host}:{options.port}"
        try:
            port = self._server.add_insecure_port(wanted)
        except RuntimeError:
            raise UnavailableError(f"can't listen on {wanted}: is the port taken?") from None
        return f"{options.host}:{port}"
