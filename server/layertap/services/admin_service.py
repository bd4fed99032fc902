"""The servicer of ``layertap.v1.AdminService``, and what a reload tells it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import grpc
from google.protobuf.message import DecodeError as ProtobufDecodeError

from layertap.errors import DecodeError
from layertap.services.status import guarded
from layertap.v1 import admin_service_pb2
from layertap.wire.enums import to_proto

__all__ = ["AdminService", "ModelReload", "ReloadAction", "ReloadReport"]


class ReloadAction(StrEnum):
    """What a reload did with a model, as in ``admin_service.proto``."""

    UNCHANGED = "unchanged"
    LOADED = "loaded"
    REPLACED = "replaced"
    UNLOADED = "unloaded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ModelReload:
    """What became of one model.

    Attributes:
        name: The model's name.
        action: What was done.
        reason: Why it failed; empty where it did not.
        serving: Whether it is served now, by this version or the one before.
    """

    name: str
    action: ReloadAction
    reason: str = ""
    serving: bool = True


@dataclass(frozen=True, slots=True)
class ReloadReport:
    """What a reload did.

    Attributes:
        models: The configuration's in its order, then those that are gone.
        not_applied: Settings that changed and wait for a restart.
    """

    models: tuple[ModelReload, ...]
    not_applied: tuple[str, ...] = ()


class AdminService:
    """Lets a server's owner act on it over gRPC.

    Args:
        reload: Reads configuration and weights again; raises LayertapError where it can't.
    """

    NAME = admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name

    def __init__(self, reload: Callable[[], ReloadReport]) -> None:
        self._reload = reload

    def reload(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        """Reload, and tell what came of it."""
        try:
            admin_service_pb2.ReloadRequest.FromString(message)
        except ProtobufDecodeError:
            raise DecodeError("request: got bytes that are no ReloadRequest") from None
        return _to_proto(self._reload()).SerializeToString()

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return what a ``grpc.Server`` needs to serve this."""
        method = grpc.unary_unary_rpc_method_handler(guarded(self.reload, to_owner=True))
        return grpc.method_handlers_generic_handler(self.NAME, {"Reload": method})


def _to_proto(report: ReloadReport) -> admin_service_pb2.ReloadResponse:
    return admin_service_pb2.ReloadResponse(
        models=[
            admin_service_pb2.ModelReload(
                name=model.name,
                action=to_proto(model.action, "RELOAD_ACTION"),
                reason=model.reason,
                serving=model.serving,
            )
            for model in report.models
        ],
        not_applied=report.not_applied,
    )
