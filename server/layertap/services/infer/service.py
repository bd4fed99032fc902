"""The servicer of ``inference.GRPCInferenceService``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from google.protobuf.message import Message

from layertap.engine import Engine, Extraction, ExtractionRequest, ModelHost, Reservation
from layertap.errors import DecodeError, InvalidInputError, LayertapError, ModelNotFoundError
from layertap.inference import grpc_service_pb2 as pb
from layertap.services.answer import Answer
from layertap.services.caller import Caller
from layertap.services.data_plane import Converted, DataPlane
from layertap.services.infer.infer_request import (
    check_version,
    extraction_request,
    timeout_of,
    unknown_model,
)
from layertap.services.infer.queries import Queries, log_settings, trace_settings
from layertap.services.infer.repository import Repository, RepositoryControl
from layertap.services.infer.shared_memory_rpcs import SharedMemoryRpcs
from layertap.services.infer.statistics import Statistics
from layertap.services.infer.stream import InferStream
from layertap.services.methods import Methods, StreamMethod, UnaryMethod
from layertap.services.observer import Observer
from layertap.services.parsing import parse
from layertap.services.public_errors import public_error
from layertap.services.stream_threads import StreamThreads
from layertap.shm.client_regions import ClientRegions
from layertap.wire.infer_messages import decode_infer_request, encode_infer_error

__all__ = ["InferenceService", "InferenceSettings"]

Q = TypeVar("Q", bound=Message)
DecodedInfer = tuple[pb.ModelInferRequest, list[memoryview]]
_QUERY_BYTES = 1 << 20
_OWNERS = ("RepositoryModelLoad", "RepositoryModelUnload")


@dataclass(frozen=True, slots=True)
class InferenceSettings:
    """What the service needs besides the engine.

    Attributes:
        ready: Returns whether the server is ready.
        statistics: Counts what each model has done; it must observe all extractions.
        regions: The clients' shared memory; None if clients may not register any.
        control: Loads and unloads models; None if that is not allowed.
    """

    ready: Callable[[], bool]
    statistics: Statistics
    regions: ClientRegions | None = None
    control: RepositoryControl | None = None


class InferenceService:
    """Serves an engine's models to clients of the Open Inference Protocol.

    Args:
        engine: The engine.
        settings: What the service needs besides the engine.
        observer: Notified how each inference ended.
        threads: Serves the streams.
    """

    NAME = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

    def __init__(
        self,
        engine: Engine,
        settings: InferenceSettings,
        observer: Observer,
        threads: StreamThreads,
    ) -> None:
        self._engine = engine
        self._plane = DataPlane(engine, observer)
        self._memory = SharedMemoryRpcs(settings.regions)
        self._repository = Repository(engine, settings.control)
        self._queries = Queries(
            engine, settings.ready, settings.statistics, shared_memory=self._memory.enabled
        )
        places = engine.limits.stream_in_flight
        self._streams = InferStream(
            self._plane, places, threads, self.answer_item, self.refuse_item
        )

    def infer(self, message: bytes, caller: Caller) -> Answer:
        """Run a model and return the layers that were requested."""
        received = self._plane.receive(len(message), caller)
        decoded = self._plane.decode(received, caller, partial(decode_infer_request, message))
        extraction = self._run(decoded, caller, received)
        return Answer(extraction.payload, extraction.reservation)

    def answer_item(self, message: bytes, caller: Caller, received: Reservation) -> Answer:
        """Run and answer an item of a stream, with an error if it fails."""
        request_id = ""  # Stays empty if the message can't be decoded; replies are in order anyway.
        try:
            decoded = self._plane.decode(received, caller, partial(decode_infer_request, message))
            request_id = decoded[0].id
            extraction = self._run(decoded, caller, received)
        except Exception as error:  # noqa: BLE001 - it is the reply, and is logged
            return Answer(encode_infer_error(request_id, str(public_error(error))))
        return Answer(extraction.payload, extraction.reservation)

    def refuse_item(self, message: bytes, error: LayertapError) -> Answer:
        """Answer an item of a stream with an error, without running it."""
        request_id = ""
        with suppress(DecodeError):
            request_id = decode_infer_request(message)[0].id
        return Answer(encode_infer_error(request_id, str(public_error(error))))

    def methods(self) -> Methods:
        """Return the methods by name."""
        small = {
            name: UnaryMethod(_parsed(kind, method), to_owner=name in _OWNERS)
            for name, (kind, method) in self._small_methods().items()
        }
        return {
            **small,
            "ModelInfer": UnaryMethod(self.infer),
            "ModelStreamInfer": StreamMethod(self._streams.serve),
        }

    def _run(
        self, decoded: DecodedInfer, caller: Caller, received: Reservation
    ) -> Extraction[bytes]:
        """Run a decoded request."""
        request, raw = decoded

        def convert() -> Converted:
            check_version(request.model_version)
            return request.model_name, request_for

        def request_for(host: ModelHost) -> ExtractionRequest[bytes]:
            timeout = timeout_of(request)
            if timeout is not None:
                caller.call.limit(timeout)
            return extraction_request(
                request,
                raw,
                host,
                self._engine,
                self._memory.of(caller),
                admit=received.take,
                streamed=caller.in_stream,
            )

        try:
            return self._plane.run(received, caller, convert)
        except ModelNotFoundError as error:
            raise unknown_model(request.model_name, error) from None

    def _small_methods(self) -> dict[str, tuple[type[Message], Callable[..., Message]]]:
        """Return the request class and the handler of every other method, by name."""
        queries, memory, repository = self._queries, self._memory, self._repository
        return {
            "ServerLive": (pb.ServerLiveRequest, queries.server_live),
            "ServerReady": (pb.ServerReadyRequest, queries.server_ready),
            "ServerMetadata": (pb.ServerMetadataRequest, queries.server_metadata),
            "ModelReady": (pb.ModelReadyRequest, queries.model_ready),
            "ModelMetadata": (pb.ModelMetadataRequest, queries.model_metadata),
            "ModelConfig": (pb.ModelConfigRequest, queries.model_config),
            "ModelStatistics": (pb.ModelStatisticsRequest, queries.model_statistics),
            "RepositoryIndex": (pb.RepositoryIndexRequest, repository.index),
            "RepositoryModelLoad": (pb.RepositoryModelLoadRequest, repository.load),
            "RepositoryModelUnload": (pb.RepositoryModelUnloadRequest, repository.unload),
            "SystemSharedMemoryStatus": (pb.SystemSharedMemoryStatusRequest, memory.status),
            "SystemSharedMemoryRegister": (pb.SystemSharedMemoryRegisterRequest, memory.register),
            "SystemSharedMemoryUnregister": (
                pb.SystemSharedMemoryUnregisterRequest,
                memory.unregister,
            ),
            "CudaSharedMemoryStatus": (pb.CudaSharedMemoryStatusRequest, memory.cuda_status),
            "CudaSharedMemoryRegister": (pb.CudaSharedMemoryRegisterRequest, memory.cuda_register),
            "CudaSharedMemoryUnregister": (
                pb.CudaSharedMemoryUnregisterRequest,
                memory.cuda_unregister,
            ),
            "TraceSetting": (pb.TraceSettingRequest, trace_settings),
            "LogSettings": (pb.LogSettingsRequest, log_settings),
        }


def _parsed(
    kind: type[Q], method: Callable[[Q, Caller], Message]
) -> Callable[[bytes, Caller], bytes]:
    """Return a handler that parses a small request and passes it to a method."""

    def handle(message: bytes, caller: Caller) -> bytes:
        # Only names and parameters are expected. A larger message is refused before it is parsed,
        # as the parsed objects take far more memory than its bytes.
        if len(message) > _QUERY_BYTES:
            raise InvalidInputError(
                f"request: got {len(message)} bytes, expected a {kind.__name__} of at most "
                f"{_QUERY_BYTES}"
            )
        return method(parse(kind, message), caller).SerializeToString()

    return handle
