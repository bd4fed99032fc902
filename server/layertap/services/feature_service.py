"""The servicer of ``layertap.v1.FeatureService``."""

from __future__ import annotations

import threading

from layertap.description import ModelDescription
from layertap.engine import Engine
from layertap.services.answer import Answer
from layertap.services.caller import Caller
from layertap.services.convert import Converter
from layertap.services.data_plane import DataPlane
from layertap.services.extract_stream import ExtractStream
from layertap.services.methods import Methods, StreamMethod, UnaryMethod
from layertap.services.observer import Observer
from layertap.services.parsing import parse
from layertap.services.stream_threads import StreamThreads
from layertap.shm.shared_memory import SharedMemory
from layertap.v1 import feature_service_pb2
from layertap.wire.descriptions import description_to_proto, model_to_proto
from layertap.wire.messages import decode_request

__all__ = ["FeatureService"]

MAX_ENCODINGS = 128


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
        self._converter = Converter(engine.limits.request_bytes, memory)
        self._plane = DataPlane(engine, observer)
        # A description has a row for each layer. Clients ask for it as they connect, maybe at once.
        self._lock = threading.Lock()
        self._encodings: dict[tuple[str, bool], tuple[ModelDescription, bytes]] = {}
        self._streams = ExtractStream(engine, observer, self._converter, threads)

    def extract(self, message: bytes, caller: Caller) -> Answer:
        """Run a model and return the selected layers."""
        extraction = self._plane.extract(
            message, decode_request, self._converter.convert_unary, caller
        )
        return Answer(extraction.payload, extraction.reservation)

    def list_models(self, message: bytes, caller: Caller) -> bytes:
        """List the models."""
        parse(feature_service_pb2.ListModelsRequest, message)
        models = [model_to_proto(each) for each in self._plane.models()]
        return feature_service_pb2.ListModelsResponse(models=models).SerializeToString()

    def describe_model(self, message: bytes, caller: Caller) -> bytes:
        """Describe a model and its layers."""
        request = parse(feature_service_pb2.DescribeModelRequest, message)
        return self._encoded(self._plane.describe(request.model, fingerprint=request.fingerprint))

    def _encoded(self, described: ModelDescription) -> bytes:
        """Return a description's bytes, those of the last time if nothing has changed."""
        name = described.name, bool(described.fingerprint)
        known = self._encodings.get(name)
        if known is None or known[0] != described:
            known = described, description_to_proto(described).SerializeToString()
            with self._lock:
                self._encodings.pop(name, None)
                self._encodings[name] = known
                if len(self._encodings) > MAX_ENCODINGS:  # Of models that were unloaded.
                    del self._encodings[next(iter(self._encodings))]
        return known[1]

    def methods(self) -> Methods:
        """Return the methods by name."""
        return {
            "Extract": UnaryMethod(self.extract),
            "ExtractStream": StreamMethod(self._streams.serve),
            "ListModels": UnaryMethod(self.list_models),
            "DescribeModel": UnaryMethod(self.describe_model),
        }
