"""The servicer of ``layertap.v1.SharedMemoryService``, and what requests say of shared memory."""

from __future__ import annotations

from collections.abc import Callable

import grpc
from google.protobuf.message import DecodeError as ProtobufDecodeError

from layertap.errors import DecodeError, InvalidInputError, SharedMemoryLostError
from layertap.services.status import guarded
from layertap.v1 import shared_memory_service_pb2
from layertap.wire.shared.broker import Broker
from layertap.wire.shared.hub import SharedMemory, Space
from layertap.wire.tensors import SharedTensor, TensorView

__all__ = ["SharedMemoryService", "input_of", "space_of"]


class SharedMemoryService:
    """Lets clients of this machine in.

    Args:
        broker: Where they connect.
    """

    NAME = shared_memory_service_pb2.DESCRIPTOR.services_by_name["SharedMemoryService"].full_name

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def open_shared_memory(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        """Tell where to connect."""
        try:
            shared_memory_service_pb2.OpenSharedMemoryRequest.FromString(message)
        except ProtobufDecodeError:
            raise DecodeError("request: got bytes that are no OpenSharedMemoryRequest") from None
        return shared_memory_service_pb2.OpenSharedMemoryResponse(
            socket=self._broker.name, ticket=self._broker.ticket()
        ).SerializeToString()

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return what a ``grpc.Server`` needs to serve this."""
        method = grpc.unary_unary_rpc_method_handler(guarded(self.open_shared_memory))
        return grpc.method_handlers_generic_handler(self.NAME, {"OpenSharedMemory": method})


def space_of(memory: SharedMemory | None, identifier: bytes) -> Space | None:
    """Return where the reply to a request may be written; None where it has to be sent."""
    if memory is None or not identifier:
        return None
    session = memory.session(identifier)
    return Space(memory, session) if session else None


def input_of(
    tensor: SharedTensor, space: Space | None, most: int, admit: Callable[[int], object]
) -> TensorView:
    """Return a request's tensor that stands in shared memory, as a private copy.

    Args:
        tensor: What the request says of it.
        space: What is lent to the request's session; None where it has none.
        most: Bytes that a request may have.
        admit: Called with the bytes of the copy before it is made.

    Raises:
        OverloadedError: Where ``admit`` does.
        SharedMemoryLostError: Where no such memory is lent to the request's session.
        InvalidInputError: For bytes outside of the region, or too many.
        DecodeError: For a byte of a bool tensor that is neither 0 nor 1.
    """
    if space is None:
        raise SharedMemoryLostError("shared_memory_session: got none that this server knows")
    if tensor.at.size > most:
        raise InvalidInputError(f"shared: got {tensor.at.size} bytes, expected at most {most}")
    admit(tensor.at.size)
    return tensor.view(space.memory.read(space.session, tensor.at))
