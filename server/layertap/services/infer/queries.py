"""The RPCs that only tell: of the server, of models, and what they did."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import grpc

from layertap.engine import Engine
from layertap.errors import LayertapError
from layertap.inference import grpc_service_pb2 as pb
from layertap.services.infer.describe import BACKEND, config_of, metadata_of
from layertap.services.infer.infer_request import find_host
from layertap.services.infer.statistics import Statistics

__all__ = ["Queries"]

_EXTENSIONS = ("model_configuration", "model_repository", "parameters", "statistics")


class Queries:
    """Answers them.

    Args:
        engine: The engine.
        ready: Tells whether the server is ready.
        statistics: What is told of each model.
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

    def server_live(
        self, request: pb.ServerLiveRequest, context: grpc.ServicerContext
    ) -> pb.ServerLiveResponse:
        """Answer, which is all there is to it."""
        return pb.ServerLiveResponse(live=True)

    def server_ready(
        self, request: pb.ServerReadyRequest, context: grpc.ServicerContext
    ) -> pb.ServerReadyResponse:
        """Tell what health says."""
        return pb.ServerReadyResponse(ready=self._ready())

    def server_metadata(
        self, request: pb.ServerMetadataRequest, context: grpc.ServicerContext
    ) -> pb.ServerMetadataResponse:
        """Tell who answers."""
        return pb.ServerMetadataResponse(
            name=BACKEND, version=version("layertap"), extensions=self._extensions
        )

    def model_ready(
        self, request: pb.ModelReadyRequest, context: grpc.ServicerContext
    ) -> pb.ModelReadyResponse:
        """Tell whether a model serves; no, for one that there is not."""
        try:
            find_host(self._engine, request.name, request.version)
        except LayertapError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    def model_metadata(
        self, request: pb.ModelMetadataRequest, context: grpc.ServicerContext
    ) -> pb.ModelMetadataResponse:
        """Describe a model."""
        return metadata_of(find_host(self._engine, request.name, request.version))

    def model_config(
        self, request: pb.ModelConfigRequest, context: grpc.ServicerContext
    ) -> pb.ModelConfigResponse:
        """Describe how a model is served."""
        host = find_host(self._engine, request.name, request.version)
        config = config_of(host, self._engine.limits.batch, host.compute.instances)
        return pb.ModelConfigResponse(config=config)

    def model_statistics(
        self, request: pb.ModelStatisticsRequest, context: grpc.ServicerContext
    ) -> pb.ModelStatisticsResponse:
        """Tell what one model did, or each."""
        if not request.name:
            return self._statistics.of(self._engine.hosts())
        return self._statistics.of([find_host(self._engine, request.name, request.version)])
