"""The RPCs for clients' shared memory, and the rules for which callers may use it."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass

import grpc

from layertap.errors import InvalidInputError, PermissionDeniedError
from layertap.inference import grpc_service_pb2 as pb
from layertap.services.infer.parameters import Parameters, number, text
from layertap.shm.client_regions import ClientRegions, RegionSlice

__all__ = ["PARAMETERS", "CallerMemory", "SharedMemoryRpcs"]

_REGION, _SIZE, _OFFSET = PARAMETERS = (
    "shared_memory_region",
    "shared_memory_byte_size",
    "shared_memory_offset",
)

_LOCAL_PEERS = ("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:")


@dataclass(frozen=True, slots=True)
class CallerMemory:
    """The shared memory of one caller.

    Attributes:
        regions: All regions; None if clients may not share memory.
        owner: Identifies the caller; regions belong to an owner.
        local: Whether the caller is on this machine.
    """

    regions: ClientRegions | None
    owner: Hashable
    local: bool

    def allowed(self) -> ClientRegions:
        """Return the regions; raise PermissionDeniedError if the caller may not share memory."""
        if self.regions is None:
            raise PermissionDeniedError(
                "Client shared memory is disabled: the server was started without "
                "--allow-client-shm"
            )
        if not self.local:
            raise PermissionDeniedError(
                "Client shared memory is disabled for callers from other machines"
            )
        return self.regions

    def slice(self, parameters: Parameters, where: str) -> RegionSlice | None:
        """Return the part of a region that parameters name; None if they name none.

        Raises:
            PermissionDeniedError: If the caller may not share memory.
            NotFoundError: If the caller has no such region.
            InvalidInputError: If the region has no such part.
        """
        name = text(parameters, _REGION, where)
        if not name:
            if _REGION in parameters or _SIZE in parameters or _OFFSET in parameters:
                raise InvalidInputError(f"{where}: parameter {_REGION!r}: expected a region's name")
            return None
        regions = self.allowed()
        size = number(parameters, _SIZE, where)
        return regions.slice(self.owner, name, number(parameters, _OFFSET, where), size)


class SharedMemoryRpcs:
    """Answers the RPCs about shared memory.

    Args:
        regions: The regions; None if clients may not share memory.
    """

    def __init__(self, regions: ClientRegions | None) -> None:
        self._regions = regions

    @property
    def enabled(self) -> bool:
        """Whether clients may share memory."""
        return self._regions is not None

    def of(self, context: grpc.ServicerContext) -> CallerMemory:
        """Return the memory of a call's caller.

        Regions belong to the caller's token and certificate, if it has these. Callers on this
        machine that have neither share their regions.
        """
        if self._regions is None:
            return CallerMemory(None, None, local=False)
        metadata = context.invocation_metadata() or ()
        tokens = [str(value) for key, value in metadata if key == "authorization"]
        secret = hashlib.sha256("\0".join(tokens).encode("utf-8", "surrogateescape")).digest()
        owner = (secret, tuple(context.peer_identities() or ()))
        return CallerMemory(self._regions, owner, context.peer().startswith(_LOCAL_PEERS))

    def status(
        self, request: pb.SystemSharedMemoryStatusRequest, context: grpc.ServicerContext
    ) -> pb.SystemSharedMemoryStatusResponse:
        """List the caller's regions; the keys are left out, as the caller knows them."""
        memory = self.of(context)
        response = pb.SystemSharedMemoryStatusResponse()
        for region in memory.allowed().status(memory.owner, request.name):
            entry = response.regions[region.name]
            entry.name, entry.offset, entry.byte_size = region.name, region.offset, region.byte_size
        return response

    def register(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: grpc.ServicerContext
    ) -> pb.SystemSharedMemoryRegisterResponse:
        """Register a region of the caller."""
        memory = self.of(context)
        memory.allowed().register(
            memory.owner, request.name, request.key, request.offset, request.byte_size
        )
        return pb.SystemSharedMemoryRegisterResponse()

    def unregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: grpc.ServicerContext
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        """Unregister one of the caller's regions, or all of them."""
        memory = self.of(context)
        memory.allowed().unregister(memory.owner, request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    def cuda_status(
        self, request: pb.CudaSharedMemoryStatusRequest, context: grpc.ServicerContext
    ) -> pb.CudaSharedMemoryStatusResponse:
        """List no regions: there are none in CUDA memory."""
        return pb.CudaSharedMemoryStatusResponse()

    def cuda_register(
        self, request: pb.CudaSharedMemoryRegisterRequest, context: grpc.ServicerContext
    ) -> pb.CudaSharedMemoryRegisterResponse:
        """Refuse, as CUDA shared memory is not supported."""
        raise InvalidInputError("CUDA shared memory is not supported; use system shared memory")

    def cuda_unregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, context: grpc.ServicerContext
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        """Do nothing: no CUDA memory is ever registered, but NVIDIA's clients call this anyway."""
        return pb.CudaSharedMemoryUnregisterResponse()
