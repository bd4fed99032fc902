"""The RPCs for clients' shared memory, and the rules for which callers may use it."""

from __future__ import annotations

from dataclasses import dataclass

from layertap.errors import InvalidInputError, PermissionDeniedError
from layertap.inference import grpc_service_pb2 as pb
from layertap.services.caller import Caller
from layertap.services.infer.parameters import Parameters, number, text
from layertap.shm.client_regions import ClientRegions, RegionSlice

__all__ = ["PARAMETERS", "CallerMemory", "SharedMemoryRpcs"]

_REGION, _SIZE, _OFFSET = PARAMETERS = (
    "shared_memory_region",
    "shared_memory_byte_size",
    "shared_memory_offset",
)


@dataclass(frozen=True, slots=True)
class CallerMemory:
    """The shared memory of one caller.

    Attributes:
        regions: All regions; None if clients may not share memory.
        caller: The caller. Regions belong to its token and certificate, if it has these. Callers
            on this machine that have neither share their regions.
    """

    regions: ClientRegions | None
    caller: Caller

    def allowed(self) -> ClientRegions:
        """Return the regions; raise PermissionDeniedError if the caller may not share memory."""
        if self.regions is None:
            raise PermissionDeniedError(
                "Client shared memory is disabled: the server was started without "
                "--allow-client-shm"
            )
        if not self.caller.local:
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
        return regions.slice(self.caller.identity, name, number(parameters, _OFFSET, where), size)


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

    def of(self, caller: Caller) -> CallerMemory:
        """Return the memory of a caller."""
        return CallerMemory(self._regions, caller)

    def status(
        self, request: pb.SystemSharedMemoryStatusRequest, caller: Caller
    ) -> pb.SystemSharedMemoryStatusResponse:
        """List the caller's regions; the keys are left out, as the caller knows them."""
        memory = self.of(caller)
        response = pb.SystemSharedMemoryStatusResponse()
        for region in memory.allowed().status(caller.identity, request.name):
            entry = response.regions[region.name]
            entry.name, entry.offset, entry.byte_size = region.name, region.offset, region.byte_size
        return response

    def register(
        self, request: pb.SystemSharedMemoryRegisterRequest, caller: Caller
    ) -> pb.SystemSharedMemoryRegisterResponse:
        """Register a region of the caller."""
        memory = self.of(caller)
        memory.allowed().register(
            caller.identity, request.name, request.key, request.offset, request.byte_size
        )
        return pb.SystemSharedMemoryRegisterResponse()

    def unregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, caller: Caller
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        """Unregister one of the caller's regions, or all of them."""
        memory = self.of(caller)
        memory.allowed().unregister(caller.identity, request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    def cuda_status(
        self, request: pb.CudaSharedMemoryStatusRequest, caller: Caller
    ) -> pb.CudaSharedMemoryStatusResponse:
        """List no regions: there are none in CUDA memory."""
        return pb.CudaSharedMemoryStatusResponse()

    def cuda_register(
        self, request: pb.CudaSharedMemoryRegisterRequest, caller: Caller
    ) -> pb.CudaSharedMemoryRegisterResponse:
        """Refuse, as CUDA shared memory is not supported."""
        raise InvalidInputError("CUDA shared memory is not supported; use system shared memory")

    def cuda_unregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, caller: Caller
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        """Do nothing: no CUDA memory is ever registered, but NVIDIA's clients call this anyway."""
        return pb.CudaSharedMemoryUnregisterResponse()
