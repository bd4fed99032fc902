"""The servicer of ``layertap.v1.SharedMemoryService``."""

from __future__ import annotations

from layertap.services.caller import Caller
from layertap.services.methods import Methods, UnaryMethod
from layertap.services.parsing import parse
from layertap.shm.broker import Broker
from layertap.v1 import shared_memory_service_pb2

__all__ = ["SharedMemoryService"]


class SharedMemoryService:
    """Tells clients on this machine how to open a session of shared memory.

    Args:
        broker: The broker to which they connect.
    """

    NAME = shared_memory_service_pb2.DESCRIPTOR.services_by_name["SharedMemoryService"].full_name

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def open_shared_memory(self, message: bytes, caller: Caller) -> bytes:
        """Return the socket to connect to and the ticket to present there."""
        parse(shared_memory_service_pb2.OpenSharedMemoryRequest, message)
        return shared_memory_service_pb2.OpenSharedMemoryResponse(
            socket=self._broker.name, ticket=self._broker.ticket()
        ).SerializeToString()

    def methods(self) -> Methods:
        """Return the methods by name."""
        return {"OpenSharedMemory": UnaryMethod(self.open_shared_memory)}
