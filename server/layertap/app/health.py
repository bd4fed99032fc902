"""``grpc.health.v1`` with models that come and go."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2

from layertap.services.feature_service import FeatureService
from layertap.services.infer.service import InferenceService

__all__ = ["ModelHealth"]

_SERVER = ("", FeatureService.NAME, InferenceService.NAME)

Status = health_pb2.HealthCheckResponse


class ModelHealth(health.HealthServicer):  # type: ignore[misc] # ships no types
    """Health by service name; each model has its own.

    After the server began to stop, nothing that is set is told any more.
    """

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

    def Check(  # noqa: N802 - gRPC's name
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """Answer a check. SERVICE_UNKNOWN is for watchers alone, says the protocol."""
        reply: health_pb2.HealthCheckResponse = super().Check(request, context)
        if reply.status == Status.SERVICE_UNKNOWN:
            context.set_code(grpc.StatusCode.NOT_FOUND)
        return reply
