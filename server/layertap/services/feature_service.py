"""The servicer of ``layertap.v1.FeatureService``.

The handlers take and return raw bytes. gRPC would turn an exception of a deserializer into UNKNOWN
or INTERNAL, while a malformed request should give INVALID_ARGUMENT. And the reply of Extract is
serialized already.
"""

from __future__ import annotations

from functools import partial

import grpc

from layertap.engine import Engine
from layertap.services.convert import Converter, description_to_proto, model_to_proto
from layertap.services.data_plane import DataPlane
from layertap.services.extract_stream import ExtractStream
from layertap.services.observer import Observer
from layertap.services.parsing import parse
from layertap.services.status import Handler, guarded, guarded_stream
from layertap.services.stream_threads import StreamThreads
from layertap.services.unary import answer
from layertap.shm.shared_memory import SharedMemory
from layertap.v1 import feature_service_pb2
from layertap.wire.messages import decode_request

__all__ = ["FeatureService"]


class FeatureService:
    """Serves an engine's models over gRPC.

    Args:
        engine: The engine.
        observer: Notified how each extraction ended.
        threads: Serves the streams.
        memory: The memory that is shared with clients on this machine; None for none.
    """

    NAME = feature_service_pb2.DESCRIPTOR.services_by_name["FeatureService"].full_name

    def __init__(
        self,
        engine: Engine,
        observer: Observer,
        threads: StreamThreads,
        memory: SharedMemory | None = None,
    ) -> None:
        self._engine = engine
        self._converter = Converter(engine.limits.request_bytes, memory)
        self._plane = DataPlane(engine, observer)
        self._streams = ExtractStream(engine, observer, self._converter, threads)

    def extract(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        """Run a model and return the selected layers."""
        run = partial(self._plane.extract, message, decode_request, self._converter.convert_unary)
        return answer(context, run)

    def list_models(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        """List the models."""
        parse(feature_service_pb2.ListModelsRequest, message)
        models = [model_to_proto(host) for host in self._engine.hosts()]
        return feature_service_pb2.ListModelsResponse(models=models).SerializeToString()

    def describe_model(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        """Describe a model and its layers."""
        request = parse(feature_service_pb2.DescribeModelRequest, message)
        return description_to_proto(self._engine.host(request.model)).SerializeToString()

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the handlers for ``grpc.Server.add_generic_rpc_handlers``."""
        methods = {
            "Extract": self.extract,
            "ListModels": self.list_models,
            "DescribeModel": self.describe_model,
        }
        handlers = {name: _unary(method) for name, method in methods.items()}
        handlers["ExtractStream"] = grpc.stream_stream_rpc_method_handler(
            guarded_stream(self._streams.serve)
        )
        return grpc.method_handlers_generic_handler(self.NAME, handlers)


def _unary(handler: Handler) -> grpc.RpcMethodHandler:
    return grpc.unary_unary_rpc_method_handler(guarded(handler))
