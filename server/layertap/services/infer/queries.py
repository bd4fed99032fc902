"""The RPCs that only report: about the server, its models and its settings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from importlib.metadata import version

from layertap.engine import Engine
from layertap.errors import InvalidInputError, LayertapError
from layertap.inference import grpc_service_pb2 as pb
from layertap.services.caller import Caller
from layertap.services.infer.describe import BACKEND, config_of, metadata_of
from layertap.services.infer.infer_request import find_host
from layertap.services.infer.statistics import Statistics

__all__ = ["Queries", "log_settings", "trace_settings"]

_log = logging.getLogger("layertap")

_EXTENSIONS = ("model_configuration", "model_repository", "parameters", "statistics")


class Queries:
    """Answers the queries.

    Args:
        engine: The engine.
        ready: Returns whether the server is ready.
        statistics: Counts what each model has done.
        shared_memory: Whether clients may share memory.
    """

    def __init__(
        self,
        engine: Engine,
        ready: Callable[[], bool],
        statistics: Statistics,
        *,
        shared_memory: bool,
    ) -> None:
        self._engine = engine
        self._ready = ready
        self._statistics = statistics
        shared = ("system_shared_memory",) if shared_memory else ()
        self._extensions = sorted((*_EXTENSIONS, *shared))

    def server_live(self, request: pb.ServerLiveRequest, caller: Caller) -> pb.ServerLiveResponse:
        """Report that the server process is up."""
        return pb.ServerLiveResponse(live=True)

    def server_ready(
        self, request: pb.ServerReadyRequest, caller: Caller
    ) -> pb.ServerReadyResponse:
        """Report whether the server is ready, as the health service does."""
        return pb.ServerReadyResponse(ready=self._ready())

    def server_metadata(
        self, request: pb.ServerMetadataRequest, caller: Caller
    ) -> pb.ServerMetadataResponse:
        """Report the name, version and extensions of the server."""
        return pb.ServerMetadataResponse(
            name=BACKEND, version=version("layertap"), extensions=self._extensions
        )

    def model_ready(self, request: pb.ModelReadyRequest, caller: Caller) -> pb.ModelReadyResponse:
        """Report whether a model serves; false for an unknown one."""
        try:
            find_host(self._engine, request.name, request.version)
        except LayertapError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    def model_metadata(
        self, request: pb.ModelMetadataRequest, caller: Caller
    ) -> pb.ModelMetadataResponse:
        """Describe a model."""
        return metadata_of(find_host(self._engine, request.name, request.version))

    def model_config(
        self, request: pb.ModelConfigRequest, caller: Caller
    ) -> pb.ModelConfigResponse:
        """Describe how a model is served."""
        host = find_host(self._engine, request.name, request.version)
        config = config_of(host, self._engine.limits.batch, host.compute.instances)
        return pb.ModelConfigResponse(config=config)

    def model_statistics(
        self, request: pb.ModelStatisticsRequest, caller: Caller
    ) -> pb.ModelStatisticsResponse:
        """Report the statistics of one model, or of all models."""
        if not request.name:
            return self._statistics.of(self._engine.hosts())
        return self._statistics.of([find_host(self._engine, request.name, request.version)])


def trace_settings(request: pb.TraceSettingRequest, caller: Caller) -> pb.TraceSettingResponse:
    """Report that tracing is off in this protocol; layertap uses OpenTelemetry instead."""
    _refuse(request.settings.keys(), "trace")
    response = pb.TraceSettingResponse()
    response.settings["trace_level"].value.append("OFF")
    return response


def log_settings(request: pb.LogSettingsRequest, caller: Caller) -> pb.LogSettingsResponse:
    """Report which log levels are on."""
    _refuse(request.settings.keys(), "log")
    response = pb.LogSettingsResponse()
    for name, level in (
        ("log_info", logging.INFO),
        ("log_warning", logging.WARNING),
        ("log_error", logging.ERROR),
    ):
        response.settings[name].bool_param = _log.isEnabledFor(level)
    response.settings["log_verbose_level"].uint32_param = int(_log.isEnabledFor(logging.DEBUG))
    return response


def _refuse(names: Iterable[str], kind: str) -> None:
    if given := ", ".join(sorted(names)):
        raise InvalidInputError(
            f"settings: got {given}, expected none: {kind} settings are changed by the "
            f"server's configuration only"
        )
